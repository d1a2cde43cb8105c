import contextlib
import errno
import gzip
import hashlib
import http.server
import io
import sys
import threading
import zipfile

import numpy as np
import pytest
from scipy.io import savemat

from minigrad import data

# What comes with the package.


def test_digits_are_the_published_numbers_split_once():
    x_train, y_train, x_test, y_test = data.digits()
    assert x_train.shape == (1500, 1, 8, 8) and x_test.shape == (297, 1, 8, 8)
    assert x_train.dtype == x_test.dtype == np.float32
    assert y_train.dtype == y_test.dtype == np.int64
    x, y = np.concatenate([x_train, x_test]), np.concatenate([y_train, y_test])
    assert np.array_equal(np.unique(x * 16), np.arange(17))
    assert np.array_equal(np.bincount(y), [178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    # The checksum is that of the source's file order, so the permutation is checked as well.
    order = np.argsort(np.random.RandomState(0).permutation(1797))
    levels = (x * 16).astype(np.uint8)[order]
    assert hashlib.sha256(levels).hexdigest() == (
        "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3"
    )
    assert hashlib.sha256(y.astype(np.uint8)[order]).hexdigest() == (
        "8ba4f891220f5e4c9c819638d1602d74b83618f167043c6da52a2a247841ddf0"
    )


def test_red_mites_have_the_moments_of_the_published_table():
    counts = data.red_mites()
    assert counts.shape == (150,) and counts.dtype == np.int64
    assert np.array_equal(np.bincount(counts), [70, 38, 17, 10, 9, 3, 2, 1])
    assert counts.sum() == 172
    assert counts.var(ddof=1) == pytest.approx(2.2736465, abs=5e-8)


# The files themselves, where they are at hand.


def local(load, monkeypatch):
    monkeypatch.setenv("MINIGRAD_OFFLINE", "1")
    try:
        return load()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def check_images(loaded, shapes, means):
    assert [x.shape for x in loaded] == [(n, 1, 28, 28) for n in shapes]
    for x, mean in zip(loaded, means):
        assert x.dtype == np.float32 and x.flags.c_contiguous
        assert x.min() == 0 and x.max() == 1
        assert x.mean(dtype=np.float64) == pytest.approx(mean, abs=5e-6)


def test_mnist_has_its_counts_and_means(monkeypatch):
    x_train, y_train, x_test, y_test = local(data.mnist, monkeypatch)
    check_images([x_train, x_test], [60_000, 10_000], [0.13066, 0.13251])
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert y_train.dtype == np.int64 and np.array_equal(np.bincount(y_train), counts)
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert y_test.dtype == np.int64 and np.array_equal(np.bincount(y_test), counts)


def test_fashion_mnist_has_its_counts_and_means(monkeypatch):
    x_train, y_train, x_test, y_test = local(data.fashion_mnist, monkeypatch)
    check_images([x_train, x_test], [60_000, 10_000], [0.28604, 0.28685])
    assert np.array_equal(np.bincount(y_train), [6000] * 10)
    assert np.array_equal(np.bincount(y_test), [1000] * 10)


def test_binarized_mnist_has_three_parts_of_zeros_and_ones(monkeypatch):
    parts = local(data.binarized_mnist, monkeypatch)
    check_images(parts, [50_000, 10_000, 10_000], [0.130562, 0.131127, 0.132512])
    assert all(np.array_equal(np.unique(x), [0, 1]) for x in parts)


def test_binarized_test_images_follow_mnist_sorted_by_digit(monkeypatch):
    binary = local(data.binarized_mnist, monkeypatch).x_test
    mnist = local(data.mnist, monkeypatch)
    grey = mnist.x_test[np.argsort(mnist.y_test, kind="stable")]
    # A binary pixel cannot be one on paper nor zero on full ink, were these the same images.
    assert np.all(binary[grey == 0] == 0) and np.all(binary[grey == 1] == 1)
    assert not np.all(binary[mnist.x_test == 0] == 0)


def test_omniglot_has_fifteen_and_five_drawings_of_each_character(monkeypatch):
    x_train, y_train, x_test, y_test = local(data.omniglot, monkeypatch)
    check_images([x_train, x_test], [24_345, 8_115], [0.08076, 0.07978])
    assert np.array_equal(np.bincount(y_train), [15] * 1623)
    assert np.array_equal(np.bincount(y_test), [5] * 1623)
    # The drawings of a character are alike: this fails where labels and images are out of step.
    centre = np.mean(x_train.reshape(1623, 15, 784), axis=1)
    centre -= centre.mean(axis=0)
    others = np.mean(x_test.reshape(1623, 5, 784), axis=1)
    score = (others - others.mean(axis=0)) @ (centre / np.linalg.norm(centre, axis=1)[:, None]).T
    assert np.mean(np.argmax(score, axis=1) == np.arange(1623)) > 0.5


@pytest.mark.parametrize(
    ("name", "n_train", "n_test", "dim", "ones"),
    [("waveform", 400, 4600, 22, 268 + 3085), ("nodal", 25, 28, 6, 33)],
)
def test_regression_data_have_their_shapes(monkeypatch, name, n_train, n_test, dim, ones):
    loaded = local(getattr(data, name), monkeypatch)
    assert loaded.x_train.shape == (n_train, dim) and loaded.x_test.shape == (n_test, dim)
    assert loaded.x_train.dtype == loaded.x_test.dtype == np.float64
    assert np.all(loaded.x_train[:, 0] == 1) and np.all(loaded.x_test[:, 0] == 1)
    assert loaded.y_train.shape == (n_train,) and loaded.y_test.shape == (n_test,)
    assert loaded.y_train.sum() + loaded.y_test.sum() == ones
    assert loaded.beta_mcmc.shape == loaded.beta_mean_field.shape == (250, dim)


def test_waveform_posterior_classifies_as_its_authors_did(monkeypatch):
    loaded = local(data.waveform, monkeypatch)
    beta = loaded.beta_mcmc.mean(axis=0)
    right = np.mean((loaded.x_train @ beta > 0) == loaded.y_train)
    assert right == pytest.approx(0.925, abs=5e-4)
    right = np.mean((loaded.x_test @ beta > 0) == loaded.y_test)
    assert right == pytest.approx(0.857, abs=5e-4)


# Fetching, with a small file in the place of a real one.


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGRAD_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("MINIGRAD_OFFLINE", raising=False)
    return tmp_path / "data"


@pytest.fixture
def small(monkeypatch):
    """The bytes of a file that takes the place of nodal.mat."""
    rng = np.random.default_rng(0)
    arrays = {"X_train": np.eye(3, dtype=np.uint8), "y_train": np.array([[0, 1, 1]], np.uint8)}
    arrays |= {"X_test": np.eye(3, dtype=np.uint8), "y_test": np.array([[1, 0, 1]], np.uint8)}
    arrays |= {"BetaMCMC": rng.normal(size=(3, 9)), "Beta_VB_sample": rng.normal(size=(3, 9))}
    buffer = io.BytesIO()
    savemat(buffer, arrays)
    stand_in(monkeypatch, "sivi/nodal.mat", buffer.getvalue())
    return buffer.getvalue()


def stand_in(monkeypatch, name, content):
    monkeypatch.setitem(data._SHA256, name, hashlib.sha256(content).hexdigest())


def put(folder, name, content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def files(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


@contextlib.contextmanager
def serving(answers):
    """A server on this machine: path -> (status, bytes, how many of them are sent)."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, content, sent = answers.get(self.path, (404, b"", 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:sent])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", asked
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def mirrors(monkeypatch, answers, names):
    pytest.importorskip("pooch")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(answers) as (root, asked):
        monkeypatch.setitem(data._MIRRORS, "sivi", tuple(f"{root}{name}/" for name in names))
        yield asked


def whole(content):
    return 200, content, len(content)


def explains(error, folder):
    """The message names the file, its checksum and its place, in one sentence."""
    text = str(error.value)
    assert "nodal.mat" in text and data._SHA256["sivi/nodal.mat"] in text
    assert str(folder / "sivi" / "nodal.mat") in text
    assert ". " not in text and "\n" not in text
    return text


def test_second_mirror_serves_where_the_first_fails(folder, small, monkeypatch):
    cut = 200, small, len(small) // 2
    other = whole(b"<html>please log in</html>")
    answers = {"/b/nodal.mat": cut, "/c/nodal.mat": other, "/d/nodal.mat": whole(small)}
    with mirrors(monkeypatch, answers, "abcde") as asked:
        loaded = data.nodal()
        again = data.nodal()
    assert asked == [f"/{mirror}/nodal.mat" for mirror in "abcd"]
    assert np.array_equal(loaded.x_train, np.eye(3)) and np.array_equal(loaded.y_test, [1, 0, 1])
    assert np.array_equal(loaded.beta_mcmc, again.beta_mcmc)
    assert list(files(folder)) == [folder / "sivi" / "nodal.mat"]
    assert (folder / "sivi" / "nodal.mat").read_bytes() == small


def test_failure_of_every_mirror_is_explained_and_leaves_nothing(folder, small, monkeypatch):
    answers = {"/a/nodal.mat": (200, small, 100), "/b/nodal.mat": whole(small[:-1])}
    with mirrors(monkeypatch, answers, "abc"), pytest.raises(FileNotFoundError) as error:
        data.nodal()
    text = explains(error, folder)
    assert "/a/: ConnectionError" in text or "/a/: ChunkedEncodingError" in text
    assert "/b/: another content" in text and "/c/: HTTPError" in text
    assert files(folder) == {}


def test_missing_network_is_explained(folder, monkeypatch):
    with mirrors(monkeypatch, {}, "a"):
        pass  # the server is gone now
    with pytest.raises(FileNotFoundError, match="ConnectionError") as error:
        data.nodal()
    explains(error, folder)
    assert files(folder) == {}


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (KeyboardInterrupt(), None),
    ],
)
def test_interrupted_download_leaves_nothing(folder, small, monkeypatch, trouble, message):
    pooch = pytest.importorskip("pooch")
    asked = []

    def write_half(url, output_file, _):
        asked.append(url)
        with open(output_file, "wb") as file:
            file.write(small[: len(small) // 2])
        raise trouble

    monkeypatch.setattr(pooch, "HTTPDownloader", lambda timeout: write_half)
    monkeypatch.setitem(data._MIRRORS, "sivi", ("http://a/", "http://b/"))
    with pytest.raises(type(trouble), match=message) as error:
        data.nodal()
    if isinstance(trouble, OSError):
        assert error.value.errno == errno.ENOSPC
        explains(error, folder)
    assert asked == ["http://a/nodal.mat"]  # another mirror would not help
    assert files(folder) == {}


def test_folder_that_cannot_be_made_is_explained(tmp_path, monkeypatch):
    pytest.importorskip("pooch")
    (tmp_path / "data").write_text("a file where the folder should be")
    monkeypatch.setenv("MINIGRAD_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("MINIGRAD_OFFLINE", raising=False)
    with pytest.raises(OSError, match="cannot be stored") as error:
        data.nodal()
    explains(error, tmp_path / "data")


def test_file_at_hand_needs_neither_network_nor_pooch(folder, small, monkeypatch):
    put(folder, "sivi/nodal.mat", small)
    before = files(folder)
    monkeypatch.setitem(sys.modules, "pooch", None)  # importing it fails
    assert np.array_equal(data.nodal().y_train, [0, 1, 1])
    assert files(folder) == before


def test_missing_pooch_is_explained(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(FileNotFoundError, match="pip install pooch") as error:
        data.nodal()
    explains(error, folder)


def test_offline_asks_no_mirror(folder, small, monkeypatch):
    answers = {"/a/nodal.mat": whole(small)}
    with mirrors(monkeypatch, answers, "a") as asked:
        monkeypatch.setenv("MINIGRAD_OFFLINE", "1")
        with pytest.raises(FileNotFoundError, match="MINIGRAD_OFFLINE") as error:
            data.nodal()
        explains(error, folder)
        assert asked == [] and not folder.exists()
        monkeypatch.setenv("MINIGRAD_OFFLINE", "0")
        data.nodal()
        assert asked == ["/a/nodal.mat"]


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_damaged_file_is_named_and_left_alone(folder, small, monkeypatch, damage):
    altered = bytearray(small)
    altered[-1] ^= 1
    content = {"truncated": small[:-1], "altered": bytes(altered), "empty": b""}[damage]
    put(folder, "sivi/nodal.mat", content)
    before = files(folder)
    with mirrors(monkeypatch, {"/a/nodal.mat": whole(small)}, "a") as asked:
        with pytest.raises(ValueError, match="truncated or altered") as error:
            data.nodal()
        assert hashlib.sha256(content).hexdigest() in explains(error, folder)
        assert asked == [] and files(folder) == before


def test_cache_folder_serves_where_minigrad_data_is_not_set(tmp_path, small, monkeypatch):
    monkeypatch.delenv("MINIGRAD_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MINIGRAD_OFFLINE", "1")
    put(tmp_path, "minigrad/sivi/nodal.mat", small)
    assert np.array_equal(data.nodal().y_train, [0, 1, 1])


# Formats, on files made here.


def test_idx_files_are_read_upright(folder, monkeypatch):
    rng = np.random.default_rng(1)
    x, y = rng.integers(256, size=(7, 5, 4), dtype=np.uint8), np.arange(7, dtype=np.uint8)
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", x), ("labels-idx1", y)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            content = gzip.compress(header + array.tobytes())
            stand_in(monkeypatch, f"mnist/{part}-{kind}-ubyte.gz", content)
            put(folder, f"mnist/{part}-{kind}-ubyte.gz", content)
    loaded = data.mnist()
    assert np.array_equal(loaded.x_train, x[:, None] / np.float32(255))
    assert np.array_equal(loaded.y_test, y)


def test_binarized_texts_and_packed_file_agree(folder, monkeypatch):
    rng = np.random.default_rng(2)
    bits = {
        part: rng.integers(2, size=(n, 784))
        for part, n in zip(("train", "valid", "test"), (5, 3, 2))
    }
    for part, x in bits.items():
        text = "".join(" ".join(map(str, row)) + "\n" for row in x).encode()
        stand_in(monkeypatch, f"binarized-mnist/binarized_mnist_{part}.amat", text)
        put(folder, f"binarized-mnist/binarized_mnist_{part}.amat", text)
    from_text = data.binarized_mnist()
    buffer = io.BytesIO()
    np.savez(buffer, **{part: np.packbits(x, axis=1) for part, x in bits.items()})
    name = "binarized-mnist/binarized_mnist_larochelle.npz"
    stand_in(monkeypatch, name, buffer.getvalue())
    put(folder, name, buffer.getvalue())
    packed = data.binarized_mnist()
    for a, b, x in zip(from_text, packed, bits.values()):
        assert np.array_equal(a, x.reshape(-1, 1, 28, 28)) and np.array_equal(a, b)
        assert a.dtype == b.dtype == np.float32


def test_omniglot_archives_are_averaged_exactly(folder, monkeypatch):
    image_module = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(3)
    ink = {}
    for part, characters in (("background", (2, 10)), ("evaluation", (7,))):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(f"images_{part}/", "")
            for character in characters:
                for drawer in rng.permutation(20) + 1:
                    x = rng.random((105, 105)) < 0.3
                    ink[character, drawer] = x
                    png = io.BytesIO()
                    image_module.fromarray(~x).save(png, "png")  # in these files paper is one
                    path = f"images_{part}/Greek/character01/{character:04d}_{drawer:02d}.png"
                    archive.writestr(path, png.getvalue())
        stand_in(monkeypatch, f"omniglot/images_{part}.zip", buffer.getvalue())
        put(folder, f"omniglot/images_{part}.zip", buffer.getvalue())

    def averaged(x):
        fine = np.repeat(np.repeat(x, 4, axis=0), 4, axis=1)
        return fine.reshape(28, 15, 28, 15).sum(axis=(1, 3)) / 225

    order = sorted(ink)  # by character, then drawer
    train = np.stack([averaged(ink[key]) for key in order if key[1] <= 15])
    test = np.stack([averaged(ink[key]) for key in order if key[1] > 15])
    pixels = {
        part: hashlib.sha256(np.rint(255 * x).astype(np.uint8)).hexdigest()
        for part, x in (("train", train), ("test", test))
    }
    with pytest.raises(ValueError, match="other pixels"):
        data.omniglot()
    monkeypatch.setattr(data, "_OMNIGLOT_PIXELS", pixels)
    loaded = data.omniglot()
    assert np.max(np.abs(loaded.x_train[:, 0] - train)) <= 0.5 / 255 + 1e-7
    assert np.max(np.abs(loaded.x_test[:, 0] - test)) <= 0.5 / 255 + 1e-7


def test_pickle_in_a_data_file_is_refused(folder, monkeypatch):
    name = "binarized-mnist/binarized_mnist_larochelle.npz"
    buffer = io.BytesIO()
    np.savez(buffer, train=np.array([{}], dtype=object))
    stand_in(monkeypatch, name, buffer.getvalue())
    put(folder, name, buffer.getvalue())
    with pytest.raises(ValueError, match="allow_pickle=False"):
        data.binarized_mnist()


# Binarisation.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_binarize_draws_ones_with_probability_x(dtype):
    levels = np.linspace(0, 1, 11, dtype=dtype)
    n = 40_000
    draws = data.binarize(np.tile(levels, (n, 1)), np.random.default_rng(0))
    assert draws.dtype == dtype and np.array_equal(np.unique(draws), [0, 1])
    assert np.all(draws[:, 0] == 0) and np.all(draws[:, -1] == 1)
    inner = levels[1:-1]
    z = (draws[:, 1:-1].mean(axis=0) - inner) / np.sqrt(inner * (1 - inner) / n)
    assert np.max(np.abs(z)) < 4
    # Pixels are drawn independently of each other: an exchange of one uniform would show here.
    correlation = np.corrcoef(draws[:, 1:-1].T) - np.eye(9)
    assert np.max(np.abs(correlation)) < 4.5 / np.sqrt(n)


def test_binarize_depends_on_the_generator_alone():
    x = np.full((3, 1, 8, 8), 0.5, np.float32)
    a, b = (data.binarize(x, np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, data.binarize(x, np.random.default_rng(6)))
    assert data.binarize(x[:0], np.random.default_rng(5)).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("bad", [np.arange(256), np.array([-0.1, 0.5]), np.array([0.5, np.nan])])
def test_binarize_refuses_what_is_no_probability(bad):
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\]"):
        data.binarize(bad, np.random.default_rng(0))


class _Zeros(np.random.Generator):
    """A generator whose uniforms are all 0, which they are once in 2^24."""

    def __init__(self):
        super().__init__(np.random.PCG64(0))

    def random(self, shape, dtype):
        return np.zeros(shape, dtype)


def test_binarize_never_turns_a_zero_into_a_one():
    x = np.array([0.0, 1e-6, 1.0], np.float32)
    assert np.array_equal(data.binarize(x, _Zeros()), [0, 1, 1])


def test_a_download_can_be_read_by_all_who_share_the_folder(folder, small, monkeypatch):
    with mirrors(monkeypatch, {"/a/nodal.mat": whole(small)}, "a"):
        data.nodal()
    assert (folder / "sivi" / "nodal.mat").stat().st_mode & 0o777 == 0o644


def test_a_home_folder_in_minigrad_data_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MINIGRAD_DATA", "~/data")
    monkeypatch.setenv("MINIGRAD_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "data" / "sivi" / "nodal.mat")):
        data.nodal()
