"""What the tests of streaming share."""

import numpy as np
import pytest
from safetensors.numpy import save_file

TORCH = {
    "conv.weight": (8, 8, 9, 9),
    "fc.weight": (70, 100),
    "emb.weight": (100, 60),
    "conv.bias": (8,),
    "bn.num_batches_tracked": (),
}


def torch_params():
    rng = np.random.default_rng(0)
    params = {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in TORCH.items()}
    params["fc.weight"] = params["fc.weight"].astype(np.float16)
    params["bn.num_batches_tracked"] = np.array(7, np.int64)
    return params


@pytest.fixture
def source(tmp_path):
    save_file(torch_params(), tmp_path / "torch.safetensors")
    return tmp_path / "torch.safetensors"


def parts(folder):
    return [path.name for path in folder.iterdir() if path.name.endswith((".parts", ".tmp"))]


def interrupt(path, nbytes):
    raise KeyboardInterrupt


def written(folder):
    """Bytes of all files of the checkpoint `q`."""
    return sum(path.stat().st_size for path in folder.glob("q*"))
