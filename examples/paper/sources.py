"""Where pretrained weights come from: local files that may hold them, or an address."""

import contextlib
import dataclasses
import hashlib
import http.client
import os
import re
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from btc_jax._progress import progress as progress_bar
from btc_jax.checkpoint.files import whole_file

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "btc_jax"
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 18


class WeightsMissing(FileNotFoundError):
    """The weights of a network are not available; the message says how to get them."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One published file. `aliases` are the names of copies converted to safetensors."""

    address: str
    aliases: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        return PurePosixPath(self.address).name

    @property
    def names(self) -> tuple[str, ...]:
        """File names to look for, those that can be read without PyTorch first."""
        return (*self.aliases, f"{PurePosixPath(self.file).stem}.safetensors", self.file)


CHENYAOFO = "https://github.com/chenyaofo/pytorch-cifar-models/releases/download/"
AKAMASTER = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/"
TORCHVISION = "https://download.pytorch.org/models/"
FILES = {
    "cifar10_resnet20": CHENYAOFO + "resnet/cifar10_resnet20-4118986f.pt",
    "cifar10_resnet32": CHENYAOFO + "resnet/cifar10_resnet32-ef93fc4d.pt",
    "cifar10_resnet44": CHENYAOFO + "resnet/cifar10_resnet44-2a3cabcb.pt",
    "cifar10_resnet56": CHENYAOFO + "resnet/cifar10_resnet56-187c023a.pt",
    "cifar10_shufflenetv2_x0_5": CHENYAOFO + "shufflenetv2/cifar10_shufflenetv2_x0_5-1308b4e9.pt",
    "cifar10_shufflenetv2_x1_0": CHENYAOFO + "shufflenetv2/cifar10_shufflenetv2_x1_0-98807be3.pt",
    "cifar10_shufflenetv2_x1_5": CHENYAOFO + "shufflenetv2/cifar10_shufflenetv2_x1_5-296694dd.pt",
    "cifar10_mobilenetv2_x0_5": CHENYAOFO + "mobilenetv2/cifar10_mobilenetv2_x0_5-ca14ced9.pt",
    "cifar10_repvgg_a0": CHENYAOFO + "repvgg/cifar10_repvgg_a0-ef08a50e.pt",
    "cifar100_resnet20": CHENYAOFO + "resnet/cifar100_resnet20-23dac2f1.pt",
    "cifar100_resnet32": CHENYAOFO + "resnet/cifar100_resnet32-84213ce6.pt",
    "cifar100_resnet44": CHENYAOFO + "resnet/cifar100_resnet44-ffe32858.pt",
    "cifar100_resnet56": CHENYAOFO + "resnet/cifar100_resnet56-f2eff4c8.pt",
    "cifar100_shufflenetv2_x0_5": CHENYAOFO + "shufflenetv2/cifar100_shufflenetv2_x0_5-1977720f.pt",
    "cifar100_shufflenetv2_x1_0": CHENYAOFO + "shufflenetv2/cifar100_shufflenetv2_x1_0-9ae22beb.pt",
    "cifar100_shufflenetv2_x1_5": CHENYAOFO + "shufflenetv2/cifar100_shufflenetv2_x1_5-e2c85ad8.pt",
    "cifar100_mobilenetv2_x0_5": CHENYAOFO + "mobilenetv2/cifar100_mobilenetv2_x0_5-9f915757.pt",
    "cifar100_repvgg_a0": CHENYAOFO + "repvgg/cifar100_repvgg_a0-2df1edd0.pt",
    "akamaster_resnet20": AKAMASTER + "resnet20-12fca82f.th",
    "akamaster_resnet32": AKAMASTER + "resnet32-d509ac18.th",
    "akamaster_resnet44": AKAMASTER + "resnet44-014dd654.th",
    "akamaster_resnet56": AKAMASTER + "resnet56-4bfd9763.th",
    "imagenet_resnet18": TORCHVISION + "resnet18-f37072fd.pth",
    "imagenet_resnet50": TORCHVISION + "resnet50-0676ba61.pth",
    "imagenet_resnet101": TORCHVISION + "resnet101-63fe2227.pth",
}


def _aliases(name: str) -> tuple[str, ...]:
    """The names in `shared/data` next to the checkout, where plain `cifar10_resnet20` is akamaster's."""
    origin, _, rest = name.partition("_")
    names = {"akamaster": (f"cifar10_{rest}.safetensors",), "imagenet": (f"{name}.safetensors",)}
    return names.get(origin, (f"{origin}_chenyaofo_{rest}.safetensors",))


SOURCES = {name: Source(address, _aliases(name)) for name, address in FILES.items()}


def default_folders() -> list[Path]:
    """Where weights are looked for: next to this checkout, in the cache, and in the downloads of `torch.hub`."""
    beside = Path(__file__).parents[2].parent / "shared" / "data"
    hub = Path(os.environ.get("TORCH_HOME") or CACHE.parent / "torch") / "hub" / "checkpoints"
    return [folder for folder in (beside, CACHE, hub) if folder.is_dir()]


def find(source: Source, folders: Sequence[Path]) -> list[Path]:
    """All files that hold it, those that need no PyTorch first."""
    found = [folder / name for folder in folders for name in source.names]
    return sorted(filter(Path.is_file, found), key=lambda path: path.suffix != ".safetensors")


def download(source: Source, folder: Path, progress: bool = True) -> Path:
    """Download the file into the folder, atomically, and return its path.

    Raises:
        WeightsMissing: if the address cannot be reached.
        ValueError: if the download is incomplete or has another checksum.
        OSError: if the folder cannot be written.
    """
    content = _fetch(source, folder, progress)
    check_sum(source.address, hashlib.sha256(content).hexdigest(), "download it again")
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / source.file) as file:
        file.write(content)
    return folder / source.file


def check_sum(name: str, digest: str, remedy: str) -> None:
    """Compare a SHA-256 with its first 8 digits in a file's name. The digits of akamaster's `.th` files are not used.

    Raises:
        ValueError: if they differ.
    """
    expected = re.search(r"-([0-9a-f]{8})\.pth?$", name)
    if expected and not digest.startswith(expected[1]):
        message = f"its SHA-256 begins with {digest[:8]} and its name says {expected[1]}; it is truncated or changed"
        raise ValueError(f"{name}: {message}: {remedy}")


def _fetch(source: Source, folder: Path, progress: bool) -> bytes:
    content = bytearray()
    try:
        with urllib.request.urlopen(source.address, timeout=TIMEOUT) as answer:
            total = int(answer.headers.get("Content-Length") or 0)
            with _bar(source.file, total, progress) as advance:
                while chunk := answer.read(CHUNK):
                    content += chunk
                    advance(source.file, len(chunk))
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        failed = f"{source.address} could not be downloaded ({reason})"
        raise WeightsMissing(f"{failed}: put the file into a folder for --weights, or into {folder}") from error
    if len(content) < total:
        raise ValueError(f"{source.address}: {len(content):,} of {total:,} bytes arrived; run the same command again")
    return bytes(content)


@contextlib.contextmanager
def _bar(title: str, total: int, progress: bool) -> Iterator[Callable[[str, int], None]]:
    if not progress:
        yield lambda _, size: None
        return
    with progress_bar(title, total) as advance:
        yield advance
