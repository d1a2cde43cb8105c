r"""Data sets: two small ones that come with the package, the others downloaded once and checked.

`digits` and `red_mites` need no network. The others look into the folder that the environment
variable MINIGRAD_DATA names (else `~/.cache/minigrad`, under XDG_CACHE_HOME where that is set),
with one subfolder per source: mnist, fashion-mnist, binarized-mnist, omniglot, sivi. What is there
is read and never written to, so the folder may be read-only; what is not is downloaded, unless
MINIGRAD_OFFLINE=1. The SHA-256 of every file is checked each time it is read. Raised by all of
them, with a message that says what to put where:

- FileNotFoundError: the file is not there and cannot be downloaded;
- ValueError: the file there is truncated or altered;
- OSError: the folder cannot be written to, or its disk is full.

How images were made binary is part of a data set: `binarized_mnist` is one fixed draw, which much
of the literature shares; `binarize(x, rng)` makes a fresh one of any grey images. Likelihoods on
the two are not comparable.
"""

import errno
import gzip
import hashlib
import io
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = [
    "BinarizedData",
    "ImageData",
    "RegressionData",
    "binarize",
    "binarized_mnist",
    "digits",
    "fashion_mnist",
    "mnist",
    "nodal",
    "omniglot",
    "red_mites",
    "waveform",
]


class ImageData(NamedTuple):
    """Images, float32 in [0, 1] of shape (N, 1, H, W), and their classes, int64 (N,)."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


class BinarizedData(NamedTuple):
    """Images of zeros and ones, float32 (N, 1, H, W), in three parts and without classes."""

    x_train: np.ndarray
    x_valid: np.ndarray
    x_test: np.ndarray


class RegressionData(NamedTuple):
    """Binary regression: covariates float64 (N, D), labels int64 (N,), posterior samples (S, D).

    Column 0 of the covariates is the intercept, all ones. A row of `beta_mcmc` (Gibbs sampling) or
    of `beta_mean_field` (variational) is one draw of the D coefficients by the data's authors.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    beta_mcmc: np.ndarray
    beta_mean_field: np.ndarray


def digits():
    """Return the bundled UCI digits, 8x8 with 17 grey levels: 1500 to train, 297 to test.

    These are the 1797 images, by 13 writers, of the source's test file. The split is the project's
    own: the first 1500 of a permutation drawn once, not stratified by class. So a test image has
    training images by the same writer, and accuracies do not compare with published ones.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (1998), UCI Machine
    Learning Repository, https://doi.org/10.24432/C50P49. Licence: CC BY 4.0.
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        x, y = _images(file["x"], 16), file["y"].astype(np.int64)
    # The streams of RandomState never change between versions of NumPy; a Generator's may.
    order = np.random.RandomState(0).permutation(len(x))
    train, test = order[:1500], order[1500:]
    return ImageData(x[train], y[train], x[test], y[test])


def red_mites():
    """Return the bundled counts of red mites on each of 150 apple leaves, int64 (150,).

    Source: Table 1 of C. I. Bliss and R. A. Fisher, Fitting the negative binomial distribution to
    biological data, Biometrics 9 (1953), https://doi.org/10.2307/3001850.
    """
    table = Path(__file__).with_name("red_mites.csv")
    mites, leaves = np.loadtxt(table, np.int64, delimiter=",", skiprows=1, unpack=True)
    return np.repeat(mites, leaves)


def mnist():
    """Return MNIST: grey 28x28 images of ten digits, 60,000 to train and 10,000 to test.

    Source: Y. LeCun and C. Cortes, derived from NIST's data.
    """
    return _idx_files("mnist")


def fashion_mnist():
    """Return Fashion-MNIST: grey 28x28 images of ten kinds of clothes, 60,000 and 10,000.

    Source: H. Xiao, K. Rasul and R. Vollgraf, arXiv:1708.07747. Licence: MIT.
    """
    return _idx_files("fashion-mnist")


def binarized_mnist():
    """Return the fixed binarisation of MNIST by Larochelle: 50,000, 10,000 and 10,000 images.

    The test images are sorted by digit: never take the first n as a sample of them. The order is
    not that of `mnist()`, and the source has no labels. Downloading takes 110 MB of text.

    Source: H. Larochelle and I. Murray, The neural autoregressive distribution estimator (2011).
    """
    packed = "binarized-mnist/binarized_mnist_larochelle.npz"
    parts = ("train", "valid", "test")
    if (_folder() / packed).exists():
        with _load_npz(packed) as file:
            bits = [np.unpackbits(file[part], axis=1) for part in parts]
    else:
        texts = (_read(f"binarized-mnist/binarized_mnist_{part}.amat") for part in parts)
        # Each of the 784 digits of a line has one character behind it: a space, or the newline.
        bits = [np.frombuffer(text, np.uint8)[::2] - ord("0") for text in texts]
    return BinarizedData(*(_images(x.reshape(-1, 28, 28), 1) for x in bits))


def omniglot():
    """Return Omniglot at 28x28, grey: 24,345 images to train and 8,115 to test; y in 0..1622.

    The class is the character drawn; drawers 1 to 15 of each are for training, 16 to 20 for
    testing. Sorted by character: shuffle before splitting off a validation set.

    These are area averages of the official 105x105 images and *not* the `chardata.mat` of Burda,
    Grosse and Salakhutdinov (2016), whose filter and choice of drawers are unknown and whose test
    set has 8,070 images. Likelihoods do not compare, number for number, with published ones.

    Reads `omniglot28_rebuilt.npz` where the folder has it; otherwise decodes the official archives,
    which takes some seconds and needs Pillow (ImportError without it).

    Source: B. M. Lake, R. Salakhutdinov and J. B. Tenenbaum, Science 350 (2015). Licence: MIT.
    """
    rebuilt = "omniglot/omniglot28_rebuilt.npz"
    if (_folder() / rebuilt).exists():
        with _load_npz(rebuilt) as file:
            x_train, x_test = file["x_train"], file["x_test"]
    else:
        x_train, x_test = _rebuild_omniglot()
    y_train, y_test = (np.repeat(np.arange(1623, dtype=np.int64), drawers) for drawers in (15, 5))
    return ImageData(_images(x_train, 255), y_train, _images(x_test, 255), y_test)


def waveform():
    """Return the waveform data: 400 to train, 4,600 to test, 22 covariates, prior N(0, 100 I).

    The mean of `beta_mcmc` classifies 92.5 % of the training and 85.7 % of the test rows rightly.

    Source: M. Yin and M. Zhou, Semi-implicit variational inference (ICML 2018), its repository.
    """
    return _regression("waveform")


def nodal():
    """Return the nodal-involvement data: 25 to train, 28 to test, 6 covariates of zeros and ones.

    By its size and columns, the 53 prostate-cancer patients of Brown (1980). Label 1 seems to mean
    *not* involved: 33 labels are 1, where 20 patients had involved nodes. The posterior is wide.

    Source: M. Yin and M. Zhou, Semi-implicit variational inference (ICML 2018), its repository.
    """
    return _regression("nodal")


def binarize(x, rng):
    """Return a fresh draw of zeros and ones, each one with probability x; shape and dtype of x.

    Raises ValueError unless 0 <= x <= 1.
    """
    x = np.asarray(x)
    if not np.all((x >= 0) & (x <= 1)):
        raise ValueError(
            f"binarize needs probabilities in [0, 1], got {x.min()} to {x.max()}; "
            "divide grey values by their maximum first"
        )
    return (rng.random(x.shape, dtype=np.float32) < x).astype(x.dtype)


# Formats.


def _images(levels, top):
    return np.divide(levels, top, dtype=np.float32, order="C")[:, None]


def _load_npz(name):
    return np.load(io.BytesIO(_read(name)), allow_pickle=False)


def _idx_files(folder):
    arrays = []
    for part in ("train", "t10k"):
        x = _read_idx(f"{folder}/{part}-images-idx3-ubyte.gz")
        y = _read_idx(f"{folder}/{part}-labels-idx1-ubyte.gz")
        arrays += [_images(x, 255), y.astype(np.int64)]
    return ImageData(*arrays)


def _read_idx(name):
    content = gzip.decompress(_read(name))
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _regression(name):
    from scipy.io import loadmat  # a tenth of a second, so only when asked for

    file = loadmat(io.BytesIO(_read(f"sivi/{name}.mat")))
    arrays = []
    for part in ("train", "test"):
        arrays.append(file[f"X_{part}"].astype(np.float64, order="C"))
        arrays.append(file[f"y_{part}"].ravel().astype(np.int64))
    return RegressionData(*arrays, file["BetaMCMC"].T, file["Beta_VB_sample"].T)


def _rebuild_omniglot():
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("decoding Omniglot needs Pillow: pip install pillow") from error

    # A pixel of 28x28 covers 3.75 x 3.75 fine ones. Counted in quarters, overlaps are integers:
    # the ink under a pixel is k of 225, exact in float32, and 255 k / 225 is never half-way.
    overlap = np.repeat(np.eye(105, dtype=np.float32), 4, axis=1).reshape(105, 28, 15).sum(axis=2)
    grey = {}
    for part in ("background", "evaluation"):
        with zipfile.ZipFile(io.BytesIO(_read(f"omniglot/images_{part}.zip"))) as archive:
            for member in archive.namelist():
                if not member.endswith(".png"):
                    continue
                character, drawer = map(int, Path(member).stem.split("_"))
                with archive.open(member) as file, Image.open(file) as image:
                    ink = 1 - np.asarray(image, dtype=np.float32)
                k = overlap.T @ ink @ overlap
                grey[character, drawer] = np.rint(k * (255 / 225)).astype(np.uint8)
    parts = []
    for part, drawers in (("train", range(1, 16)), ("test", range(16, 21))):
        x = np.stack([grey[key] for key in sorted(grey) if key[1] in drawers])
        if hashlib.sha256(x).hexdigest() != _OMNIGLOT_PIXELS[part]:
            raise ValueError("Omniglot was decoded to other pixels than expected; report this")
        parts.append(x)
    return parts


# Files.

_SHA256 = {
    "mnist/train-images-idx3-ubyte.gz": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
    ),
    "mnist/train-labels-idx1-ubyte.gz": (
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
    ),
    "mnist/t10k-images-idx3-ubyte.gz": (
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    ),
    "mnist/t10k-labels-idx1-ubyte.gz": (
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
    "fashion-mnist/train-images-idx3-ubyte.gz": (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
    ),
    "fashion-mnist/train-labels-idx1-ubyte.gz": (
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
    ),
    "fashion-mnist/t10k-images-idx3-ubyte.gz": (
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
    ),
    "fashion-mnist/t10k-labels-idx1-ubyte.gz": (
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
    ),
    "binarized-mnist/binarized_mnist_larochelle.npz": (
        "529e637f46280fddb86901f53cf8053ec131240c25153715591efc7222339f26"
    ),
    "binarized-mnist/binarized_mnist_train.amat": (
        "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d"
    ),
    "binarized-mnist/binarized_mnist_valid.amat": (
        "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2"
    ),
    "binarized-mnist/binarized_mnist_test.amat": (
        "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c"
    ),
    "omniglot/omniglot28_rebuilt.npz": (
        "54e37b7c4bc82465e723e13bcf4b7b6a24b23b7d1367afdbb83f7c2512a4d256"
    ),
    "omniglot/images_background.zip": (
        "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640"
    ),
    "omniglot/images_evaluation.zip": (
        "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee"
    ),
    "sivi/waveform.mat": "6144205fd645b47cd887e886490b263ecf22f435864690cf51016b8c085558a9",
    "sivi/nodal.mat": "d158a3d0d0350440746a551b665ef86b59497865b1417f01207c0b58fd011d35",
}

_OMNIGLOT_PIXELS = {
    "train": "5273d2abfcc1f4c36f8734236c0d9016dfed0775079b10c5ce127eac10965086",
    "test": "283e02eb1a975d21fdfd5bd8401486106c1b8b65cf1541fd876d898339e765ad",
}

_MIRRORS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "http://yann.lecun.com/exdb/mnist/",
    ),
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
    "binarized-mnist": ("http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",),
    "omniglot": ("https://raw.githubusercontent.com/brendenlake/omniglot/master/python/",),
    "sivi": ("https://raw.githubusercontent.com/mingzhang-yin/SIVI/master/data/",),
}


def _folder():
    if folder := os.environ.get("MINIGRAD_DATA"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "minigrad").expanduser()


def _read(name):
    """Return the bytes of a data file, downloaded first where the folder does not have it."""
    path, expected = _folder() / name, _SHA256[name]
    if not path.exists():
        _download(name, path)
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(
            f"{path} is truncated or altered (its sha256 is {found}): put the file with sha256 "
            f"{expected} there, or delete it to have it downloaded again"
        )
    return content


def _download(name, path):
    expected = _SHA256[name]
    by_hand = f"put the file with sha256 {expected} at {path} (MINIGRAD_DATA names another folder)"
    if os.environ.get("MINIGRAD_OFFLINE", "0") not in ("", "0"):
        raise FileNotFoundError(
            f"{name} is missing and MINIGRAD_OFFLINE forbids downloading it: {by_hand}"
        )
    try:
        import pooch
        from requests import RequestException  # what pooch downloads with
    except ImportError as error:
        raise FileNotFoundError(
            f"{name} is missing and downloading it needs pooch: pip install pooch, or {by_hand}"
        ) from error
    failures = []
    for mirror in _MIRRORS[path.parent.name]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Writes under another name, and moves only what has the right checksum into place.
            pooch.retrieve(
                mirror + path.name,
                expected,
                path.name,
                path.parent,
                downloader=pooch.HTTPDownloader(timeout=20),
            )
            path.chmod(0o644)  # a shared folder: pooch leaves it readable by its owner alone
            return
        except RequestException as error:
            failures.append(f"{mirror}: {type(error).__name__}")
        except ValueError:
            failures.append(f"{mirror}: another content")
        except OSError as error:  # the disk, not the network: no other mirror helps
            raise OSError(
                error.errno or errno.EACCES,
                f"{name} cannot be stored in {path.parent} ({error.strerror or error}): "
                f"set that right, or {by_hand}",
            ) from error
    raise FileNotFoundError(
        f"{name} is missing and cannot be downloaded ({'; '.join(failures)}): {by_hand}"
    )
