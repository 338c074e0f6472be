"""Every layout of the data, from small files created here, and every way in which they can be wrong."""

import os
import pickle
import zipfile

import numpy as np
import pytest

from examples.paper.data import Labelled, load_cifar, local_cifar10
from examples.paper.imagenet import load_imagenet, read_image
from examples.paper.pickles import load_pickle
from tests.paper_data_support import IMAGES as IMAGES
from tests.paper_data_support import RNG as RNG
from tests.paper_data_support import write as write

pytest.importorskip("sklearn")


Image = pytest.importorskip("PIL.Image")


PLANES = IMAGES.transpose(0, 3, 1, 2).reshape(5, -1)


LABELS = [3, 0, 9, 1, 2]


def same(found: Labelled, labels=LABELS) -> bool:
    return np.array_equal(found.inputs, IMAGES) and found.labels.tolist() == labels and found.labels.dtype == np.int32


def python_batch(path, protocol, **labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    batch = {b"data": PLANES, b"batch_label": b"testing"} | {name.encode(): value for name, value in labels.items()}
    path.write_bytes(pickle.dumps(batch, protocol=protocol))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("named", ["", "cifar-10-batches-py", "cifar-10-batches-py/test_batch"])
def test_python_batches_are_found_in_their_folder_above_it_or_by_name(tmp_path, protocol, named):
    python_batch(tmp_path / "cifar-10-batches-py" / "test_batch", protocol, labels=LABELS)
    assert same(load_cifar(tmp_path / named, "cifar10"))


def test_python_batches_of_cifar100_have_fine_labels(tmp_path):
    python_batch(tmp_path / "cifar-100-python" / "test", 2, fine_labels=[99, 0, 1, 2, 3], coarse_labels=[0] * 5)
    found = load_cifar(tmp_path, "cifar100")
    assert same(found, [99, 0, 1, 2, 3])
    assert found.classes == 100


def test_binary_batches(tmp_path):
    records = np.concatenate([np.array(LABELS, np.uint8)[:, None], PLANES], axis=1)
    (tmp_path / "test_batch.bin").write_bytes(records.tobytes())
    assert same(load_cifar(tmp_path, "cifar10"))
    fine = np.concatenate(
        [np.full((5, 1), 19, np.uint8), np.array([[99], [1], [2], [3], [4]], np.uint8), PLANES], axis=1
    )
    (tmp_path / "cifar-100-binary").mkdir()
    (tmp_path / "cifar-100-binary" / "test.bin").write_bytes(fine.tobytes())
    assert same(load_cifar(tmp_path, "cifar100"), [99, 1, 2, 3, 4])


def test_npz(tmp_path):
    np.savez(tmp_path / "mine.npz", images=IMAGES, labels=np.array(LABELS))
    assert same(load_cifar(tmp_path / "mine.npz", "cifar10"))


def test_exact_and_jpeg_images_beside_each_other(tmp_path):
    assert local_cifar10(tmp_path) is None
    np.savez(tmp_path / "cifar10_test_932.npz", images=IMAGES, labels=np.array(LABELS))
    np.savez(tmp_path / "cifar10_test_jpeg.npz", images=IMAGES[::-1], labels=np.array(LABELS[::-1]))
    known, compared = local_cifar10(tmp_path) or pytest.fail("not found")
    assert same(known)
    assert compared is known
    known, compared = local_cifar10(tmp_path, 3) or pytest.fail("not found")
    assert (len(known), len(compared), compared.labels.tolist()) == (5, 3, [2, 1, 9])
    assert compared.name == "3 of 5 CIFAR-10 test images as JPEG"


def test_digests_tell_inputs_and_labels_apart(tmp_path):
    one = Labelled("a", IMAGES, np.array(LABELS), 10)
    others = [Labelled("a", IMAGES[::-1], one.labels, 10), Labelled("a", IMAGES, one.labels[::-1], 10)]
    assert len({one.digest(), *(other.digest() for other in others)}) == 3
    assert one.digest() == Labelled("b", IMAGES.copy(), one.labels, 10).digest()


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("test_batch.bin", lambda: b"\1" * 3000, "3,000 bytes are not a multiple of the record size 3,073"),
        ("test_batch", lambda: pickle.dumps({b"data": PLANES, b"labels": LABELS})[:400], "not a pickle of plain"),
        (
            "test_batch",
            lambda: pickle.dumps({b"data": PLANES, b"fine_labels": LABELS}),
            r"is it cifar100 \(--cifar100\)",
        ),
        ("test_batch", lambda: pickle.dumps([1, 2]), "not a CIFAR batch"),
        (
            "test_batch",
            lambda: pickle.dumps({b"data": PLANES[:, :7], b"labels": LABELS}),
            r"uint8\[n, 3072\] is required",
        ),
        (
            "test_batch",
            lambda: pickle.dumps({b"data": PLANES, b"labels": [10, 0, 0, 0, 0]}),
            "10 classes, but labels run",
        ),
        (
            "test_batch",
            lambda: pickle.dumps({b"data": PLANES, b"labels": [1, 2]}),
            r"5 examples have labels int64\[2\]",
        ),
    ],
)
def test_wrong_cifar_files_are_named_in_one_line(tmp_path, name, make, message):
    path = write(tmp_path / name, make())
    with pytest.raises(ValueError, match=message) as caught:
        load_cifar(path, "cifar10")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_npz_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist; give the folder"):
        load_cifar(tmp_path / "none", "cifar10")
    with pytest.raises(ValueError, match=r"has no test images of cifar100: looked for test, test.bin, test.npz"):
        load_cifar(tmp_path, "cifar100")
    np.savez(tmp_path / "a.npz", pictures=IMAGES)
    with pytest.raises(ValueError, match=r"it has no array 'images', but \['pictures'\]"):
        load_cifar(tmp_path / "a.npz", "cifar10")
    with pytest.raises(ValueError, match=r"not an .npz file of plain arrays"):
        load_cifar(write(tmp_path / "b.npz", b"not a zip"), "cifar10")
    np.savez(tmp_path / "c.npz", images=np.array([{}], object), labels=np.zeros(1))
    with pytest.raises(ValueError, match=r"not an .npz file of plain arrays"):
        load_cifar(tmp_path / "c.npz", "cifar10")
    whole = (tmp_path / "a.npz").read_bytes()
    with pytest.raises(ValueError, match=r"not an .npz file of plain arrays"):
        load_cifar(write(tmp_path / "d.npz", whole[: len(whole) // 2]), "cifar10")
    np.savez(tmp_path / "e.npz", images=IMAGES.astype(np.float32), labels=np.array(LABELS))
    with pytest.raises(ValueError, match=r"images are float32\[5, 32, 32, 3\]; uint8"):
        load_cifar(tmp_path / "e.npz", "cifar10")


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Evil(os.system, ("touch /tmp/should_never_be_there",))),
        pickle.dumps(Evil(eval, ("1 + 1",))),
        pickle.dumps(np.array([Evil(print, ("x",))], object)),
        pickle.dumps(np.zeros(2, "datetime64[s]")),
        pickle.dumps(zipfile.ZipFile),
        b"cnumpy\nndarray\n(I1000000000000\ntR.",  # calls numpy.ndarray
        b"",
    ],
)
def test_pickles_call_nothing(tmp_path, content):
    with pytest.raises(ValueError, match=r"not a pickle of plain arrays"):
        load_pickle(write(tmp_path / "evil", content))


def test_pickles_of_arrays_and_numbers(tmp_path):
    value = {"a": np.arange(6.0).reshape(2, 3).T, "b": [np.float32(2.5), 1, None, b"x"], "c": np.zeros((0, 2), np.int8)}
    for protocol in range(2, 6):
        found = load_pickle(write(tmp_path / "plain", pickle.dumps(value, protocol=protocol)))
        np.testing.assert_array_equal(found["a"], value["a"])
        assert found["b"] == value["b"]
        assert found["c"].shape == (0, 2)


def jpeg(path, size=(300, 260), colour=(200, 30, 90), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour if mode == "RGB" else 90).save(path, format="JPEG")


def test_imagenet_by_folders(tmp_path):
    for name in ("n03", "n01", "n02"):
        jpeg(tmp_path / name / "b.JPEG")
        jpeg(tmp_path / name / "a.jpeg", mode="L")
    (tmp_path / "empty").mkdir()
    found = load_imagenet(tmp_path, classes=3)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [path.parent.name for path in found.inputs.paths] == ["n01", "n01", "n02", "n02", "n03", "n03"]
    batch = found.inputs[np.array([0, 5])]
    assert (batch.shape, batch.dtype) == ((2, 224, 224, 3), np.uint8)
    assert np.abs(batch[0].astype(int) - 90).max() <= 2  # grey, in three channels
    assert load_imagenet(tmp_path, images=3, classes=3).labels.tolist() == [0, 1, 2]
    assert found.digest() == load_imagenet(tmp_path, classes=3).digest()


def test_imagenet_by_list(tmp_path):
    for name in ("x.JPEG", "y.JPEG"):
        jpeg(tmp_path / name)
    (tmp_path / "val.txt").write_text("val/y.JPEG 7\nx.JPEG 2\n\n")
    assert load_imagenet(tmp_path, classes=8).labels.tolist() == [2, 7]
    with pytest.raises(ValueError, match=r"has 7 classes, but labels run from 2 to 7"):
        load_imagenet(tmp_path, classes=7)
    (tmp_path / "val.txt").write_text("490\n361\n")
    with pytest.raises(ValueError, match=r"line 1: '490' is not 'NAME NUMBER'"):
        load_imagenet(tmp_path)
    (tmp_path / "val.txt").write_text("x.JPEG 1\n")
    with pytest.raises(ValueError, match=r"no label for y.JPEG \(1 such"):
        load_imagenet(tmp_path)
    (tmp_path / "more.txt").write_text("")
    with pytest.raises(ValueError, match=r"2 text files; one with lines"):
        load_imagenet(tmp_path)


def test_wrong_imagenet_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist; give the folder of ImageNet"):
        load_imagenet(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has neither images nor class folders"):
        load_imagenet(tmp_path)
    jpeg(tmp_path / "n01" / "a.JPEG")
    with pytest.raises(ValueError, match=r"has 1 class folders; 1000 are needed"):
        load_imagenet(tmp_path)
    for content in (b"no image", (tmp_path / "n01" / "a.JPEG").read_bytes()[:200]):
        with pytest.raises(ValueError, match=r"not a readable image"):
            read_image(write(tmp_path / "bad.JPEG", content))


@pytest.mark.parametrize("size", [(300, 260), (260, 300), (500, 375), (224, 224), (33, 801)])
def test_images_are_resized_and_cropped_as_by_torchvision(tmp_path, size):
    """torchvision 0.20: short side to 256, long to int(256 * long / short); the crop begins at round(rest / 2)."""
    pixels = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    short, long = min(size), max(size)
    scaled = [256 if side == short else int(256 * long / short) for side in size]
    resized = np.asarray(Image.fromarray(pixels).resize(scaled, Image.BILINEAR))
    top, left = (round((side - 224) / 2.0) for side in resized.shape[:2])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), resized[top : top + 224, left : left + 224])
