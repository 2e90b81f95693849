"""Pictures: every file is a picture or one clear line, in little time and memory, and nothing leaves the machine."""

import base64
import dataclasses
import io
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="needs the extra gptjax[images]")
from hostile_images import READ, REFUSED, exif, noise, picture, png, saved
from PIL import Image, ImageOps

from gptjax.config import VisionConfig
from gptjax.config.section import InputError
from gptjax.data.image_reader import ImageReader
from gptjax.data.images import Picture, decoder_versions, from_data_url, image_patches, patches_of, read_image

VISION = VisionConfig(side=32, patch=8)
SECONDS, MEGABYTES = 0.05, 300


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something left the machine")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def seconds(function) -> float:
    """Seconds of this thread alone, the better of two: others work on this machine."""
    times = []
    for _ in range(2):
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return min(times)


def refusal(content: bytes) -> str:
    with pytest.raises(InputError) as caught:
        read_image(content, "photo.bin")
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_is_one_clear_line_at_once(name):
    make, word = REFUSED[name]
    content = make()
    line = refusal(content)
    assert line.startswith("photo.bin: ") and "\n" not in line and len(line) < 300 and word in line, line
    assert seconds(lambda: refusal(content)) < SECONDS


@pytest.mark.parametrize("name", READ)
def test_an_unusual_picture_is_read_at_once(name):
    make, size = READ[name]
    content = make()
    pixels_HWC = read_image(content, "photo.bin")
    assert pixels_HWC.shape == (*size, 3) and pixels_HWC.dtype == np.uint8
    assert image_patches(content, "photo.bin", VISION).shape == (16, 192)
    assert seconds(lambda: image_patches(content, "photo.bin", VISION)) < SECONDS


CHILD = """
import sys
from pathlib import Path
import gptjax.data.image_reader
from gptjax.config import VisionConfig
from gptjax.data.images import InputError, image_patches
read = refused = 0
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        image_patches(path.read_bytes(), path.name, VisionConfig(side=32, patch=8))
        read += 1
    except InputError:
        refused += 1
assert not {"jax", "flax"} & set(sys.modules)
kilobytes = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(read, refused, int(kilobytes[0]) * 1024 // 10**6)
"""


def in_a_process_of_its_own(folder: Path) -> tuple[int, int, int]:
    """Pictures read, files refused, and the megabytes of memory that one process needed for all of them."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read, refused, megabytes = map(int, done.stdout.split())
    return read, refused, megabytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of memory")
def test_all_of_them_fit_into_little_memory_and_need_no_jax(tmp_path, monkeypatch, record_property):
    monkeypatch.undo()
    for i, (make, _) in enumerate([*REFUSED.values(), *READ.values()]):
        (tmp_path / f"{i:03}.bin").write_bytes(make())
    read, refused, megabytes = in_a_process_of_its_own(tmp_path)
    assert (read, refused) == (len(READ), len(REFUSED)) and read + refused >= 40 and megabytes < MEGABYTES
    record_property("summary", f"{refused} hostile files and {read} unusual pictures: {megabytes} MB in one process")


def test_a_picture_whose_file_ends_anywhere_is_whole_or_one_line():
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        content = saved(picture(), kind)
        whole = read_image(content, "photo")
        for stop in [*range(0, 40), *range(40, len(content), max(1, len(content) // 40))]:
            try:
                assert np.array_equal(read_image(content[:stop], "photo"), whole)
            except InputError as error:
                assert "\n" not in str(error)


def test_a_damaged_byte_gives_a_picture_or_one_line():
    rng = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        content = saved(picture(), kind)
        for _ in range(100):
            at = int(rng.integers(0, len(content)))
            try:
                read_image(content[:at] + bytes([rng.integers(0, 256)]) + content[at + 1 :], "photo")
            except InputError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(orientation):
    content = saved(picture(), "PNG", exif=exif(orientation))
    want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    np.testing.assert_array_equal(read_image(content, "photo"), want)


def test_what_is_transparent_is_over_white():
    rgba = np.zeros((1, 4, 4), np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, (0, 51, 204, 255)
    content = saved(Image.fromarray(rgba), "PNG")
    want = [[255, 255, 255], [244, 204, 204], [211, 51, 51], [200, 0, 0]]
    np.testing.assert_array_equal(read_image(content, "photo")[0], want)
    palette = saved(Image.fromarray(rgba[:, :, :3]).convert("P"), "PNG", transparency=bytes(256))
    assert (read_image(palette, "photo") == 255).all()


def test_of_sixteen_bits_the_upper_eight_are_read():
    rows = np.array([[0, 255, 256, 65_535]], np.uint16)
    content = saved(Image.fromarray(rows), "PNG")
    np.testing.assert_array_equal(read_image(content, "photo")[0, :, 0], [0, 0, 1, 255])


def test_a_large_picture_is_read_as_a_small_one_is():
    """Pixels are converted in strips; three of them here."""
    content = saved(Image.fromarray(noise(1_500, 2_000)), "PNG", compress_level=1)
    np.testing.assert_array_equal(read_image(content, "photo"), noise(1_500, 2_000))


@pytest.mark.parametrize("orientation", [1, 6])
def test_patches_of_a_file_are_those_of_its_pixels_resized_at_once(orientation):
    content = saved(Image.fromarray(noise(1_500, 2_000)), "PNG", compress_level=1, exif=exif(orientation))
    pixels = read_image(content, "photo")
    patches = image_patches(content, "photo", VISION)
    np.testing.assert_array_equal(patches, patches_of(pixels, VISION))
    size = (32, 24) if orientation == 1 else (24, 32)
    resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    square = patches.reshape(4, 4, 8, 8, 3).swapaxes(1, 2).reshape(32, 32, 3)
    np.testing.assert_array_equal(square[4:28] if orientation == 1 else square[:, 4:28], resized)


def test_patches_are_in_raster_order():
    pixels = noise(32, 32)
    patches = patches_of(pixels, VISION)
    assert patches.shape == (16, 192) and patches.dtype == np.uint8
    np.testing.assert_array_equal(patches[6].reshape(8, 8, 3), pixels[8:16, 16:24])


def test_a_fitted_picture_keeps_its_proportions_or_fills_the_square():
    pixels = np.zeros((10, 40, 3), np.uint8)
    padded = patches_of(pixels, VISION).reshape(4, 4, 8, 8, 3).swapaxes(1, 2).reshape(32, 32, 3)
    assert (padded[:12] == 255).all() and (padded[12:20] == 0).all() and (padded[20:] == 255).all()
    assert (patches_of(pixels, dataclasses.replace(VISION, fit="stretch")) == 0).all()
    assert patches_of(np.zeros((16_384, 1, 3), np.uint8), VISION).min() == 0


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def test_a_data_url_gives_its_bytes():
    content = png(3, 2)
    url = data_url(content)
    assert from_data_url(url, "message 1") == content
    assert from_data_url(f"\n DATA:Image/PNG;Base64, {url[22:40]}\r\n {url[40:]}\n", "message 1") == content


@pytest.mark.parametrize(
    "url, word",
    [
        ("https://example.com/cat.png", "https:, which is never fetched"),
        ("HTTP://169.254.169.254/latest", "http:, which is never fetched"),
        ("file:///etc/passwd", "file:, which is never fetched"),
        ("ftp://a/b.png", "ftp:"),
        ("gs://a/b.png", "gs:"),
        ("javascript:alert(1)", "javascript:"),
        ("//example.com/cat.png", "wanted data:"),
        ("cat.png", "wanted data:"),
        ("", "wanted data:"),
        ("data:", "wanted image/png"),
        ("data:,hello", "wanted image/png"),
        ("data:text/html;base64,AAAA", "text/html"),
        ("data:image/svg+xml;base64,AAAA", "svg"),
        ("data:image/png,AAAA", "base64"),
        ("data:image/png;charset=utf-8;base64,AAAA", "charset"),
        ("data:image/png;base64", "wanted image/png"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,AAA", "broken base64"),
        ("data:image/png;base64,AA%2BA", "broken base64"),
        ("data:image/png;base64,AA=A", "broken base64"),
        ("data:image/png;base64,\u0410AAA", "broken base64"),
        ("data:image/png;base64," + "A" * 26_700_000, "bytes"),
        ("data:image/png;base64," + " " * 41_000_000, "characters"),
    ],
    ids=lambda value: value[:40],
)  # fmt: skip
def test_any_other_url_is_one_line_and_nothing_is_fetched(url, word):
    with pytest.raises(InputError) as caught:
        from_data_url(url, "message 1")
    line = str(caught.value)
    assert line.startswith("message 1: ") and word in line and "\n" not in line and len(line) < 200, line


def test_a_picture_is_known_by_its_bytes():
    one, same, other = (Picture.of(png(side, 1), "photo") for side in (1, 1, 2))
    assert one.key == same.key != other.key and len(one.key) == 64


def test_decoders_say_their_versions():
    assert all(decoder_versions()[name] for name in ("Pillow", "libjpeg-turbo", "zlib", "libwebp"))


def test_without_pillow_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"pip install 'gptjax\[images\]'"):
        read_image(png(1, 1), "photo")


@pytest.fixture(scope="module")
def reader():
    with ImageReader() as reader:
        yield reader


def pid(reader: ImageReader) -> int:
    assert reader._worker
    return reader._worker.process.pid


def test_a_process_of_its_own_makes_the_same_patches_for_many_threads(reader):
    files = [saved(Image.fromarray(noise(20 + i, 30)), "PNG") for i in range(8)] * 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda content: reader.patches(content, "photo", VISION), files))
    for content, patches in zip(files, found, strict=True):
        np.testing.assert_array_equal(patches, image_patches(content, "photo", VISION))


def test_a_process_of_its_own_refuses_with_the_same_line(reader):
    before = pid(reader)
    with pytest.raises(InputError, match="message 2: an SVG drawing"):
        reader.patches(b"<svg/>", "message 2", VISION)
    assert pid(reader) == before


def test_a_picture_that_ends_the_process_is_one_line_and_the_next_one_is_read(reader):
    before = pid(reader)
    os.kill(before, signal.SIGKILL)
    with pytest.raises(InputError, match="^photo: a picture that ends the process"):
        reader.patches(png(1, 1), "photo", VISION)
    assert reader.patches(png(1, 1), "photo", VISION).shape == (16, 192) and pid(reader) != before


def test_a_picture_that_takes_too_long_is_one_line_and_the_next_one_is_read(reader, monkeypatch):
    reader.patches(png(1, 1), "photo", VISION)
    monkeypatch.setattr(reader, "_seconds", 0.5)
    os.kill(pid(reader), signal.SIGSTOP)
    with pytest.raises(InputError, match="^photo: a picture that takes more than 0.5 s"):
        reader.patches(bytes(9_000_000), "photo", VISION)  # more than a pipe holds
    monkeypatch.undo()
    assert reader.patches(png(1, 1), "photo", VISION).shape == (16, 192)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's count of memory")
def test_a_picture_that_needs_too_much_memory_is_one_line_and_the_next_one_is_read():
    with ImageReader(megabytes=40) as reader:
        with pytest.raises(InputError, match="photo: .* memory"):
            reader.patches(png(4_000, 4_000), "photo", VISION)
        assert reader.patches(png(1, 1), "photo", VISION).shape == (16, 192)


LARGEST = {
    "PNG": (8_000, 5_000, {"compress_level": 1}),
    "JPEG": (8_000, 5_000, {}),
    "JPEG of several scans": (5_000, 5_000, {"progressive": True, "subsampling": 0}),
    "WebP": (3_740, 3_740, {"lossless": True, "method": 0}),
    "GIF": (8_000, 5_000, {}),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of memory")
@pytest.mark.parametrize("kind", LARGEST)
def test_the_largest_picture_fits_into_memory_here_and_in_the_reader(
    kind, tmp_path, monkeypatch, reader, record_property
):
    monkeypatch.undo()
    width, height, options = LARGEST[kind]
    mode = "P" if kind == "GIF" else "RGB" if "JPEG" in kind else "RGBA"
    content = saved(Image.new(mode, (width, height)), kind.split()[0].upper(), **options)
    (tmp_path / "photo").write_bytes(content)
    read, _, megabytes = in_a_process_of_its_own(tmp_path)
    assert read == 1 and megabytes < MEGABYTES
    assert reader.patches(content, "photo", VISION).shape == (16, 192)
    record_property("summary", f"{kind} of {width:,} x {height:,}: {megabytes} MB")
