"""`data voc` against a server on this machine that holds small archives of the layout of the real ones."""

import errno
import hashlib
import http.server
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from seg_attn.data import prepare, voc
from seg_attn.data.fetch import Archive, fetch, members, unpack
from seg_attn.data.images import image_size, read_mask, voc_palette
from seg_attn.data.prepare import VOC_SOURCES, Sources, convert_mat, prepare_voc, sources_from, trainaug_names
from seg_attn.errors import InputError

SIZE = (30, 40)
# Overlapping as the real lists do: SBD's train holds images of VOC's val, its val some of VOC's train.
VOC_TRAIN = [f"2007_{n:06d}" for n in range(6)]
VOC_VAL = [f"2008_{n:06d}" for n in range(5)]
SBD_TRAIN = [*VOC_TRAIN[:2], *VOC_VAL[:2], *[f"2009_{n:06d}" for n in range(9)]]
SBD_VAL = [*VOC_TRAIN[4:], VOC_VAL[4], *[f"2010_{n:06d}" for n in range(4)]]
TRAINAUG = 6 + 9 + 4


def mask_of(name, kind):
    rng = np.random.default_rng(sum(f"{kind}{name}".encode()))
    return np.kron(rng.integers(0, 21, (5, 8)), np.ones((6, 5))).astype(np.uint8)


def png(mask):
    image = Image.fromarray(mask)
    image.putpalette(voc_palette().tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(name):
    rng = np.random.default_rng(sum(name.encode()))
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def mat(mask):
    buffer = io.BytesIO()
    boundaries = np.empty((20, 1), dtype=object)
    boundaries[:] = [[np.zeros((2, 2), np.uint8)] for _ in range(20)]
    content = {"Boundaries": boundaries, "Segmentation": mask, "CategoriesPresent": np.unique(mask)}
    savemat(buffer, {"GTcls": content}, do_compression=True)
    return buffer.getvalue()


def tar(path, files, extra=()):
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info, io.BytesIO(b"x" * info.size))


def lines(names):
    return "".join(f"{name}\n" for name in names).encode()


def describe(path, *urls):
    data = path.read_bytes()
    digests = {"sha256": hashlib.sha256(data).hexdigest(), "md5": hashlib.md5(data).hexdigest()}
    return Archive(path.name, urls, len(data), **digests)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The two archives, as their authors publish them."""
    folder = tmp_path_factory.mktemp("published")
    base = "VOCdevkit/VOC2012"
    files = {f"{base}/ImageSets/Segmentation/{n}.txt": lines(v) for n, v in (("train", VOC_TRAIN), ("val", VOC_VAL))}
    files[f"{base}/ImageSets/Segmentation/trainval.txt"] = lines(sorted(VOC_TRAIN + VOC_VAL))
    for name in sorted({*VOC_TRAIN, *VOC_VAL, *SBD_TRAIN, *SBD_VAL}):
        files[f"{base}/Annotations/{name}.xml"] = b"<annotation/>"
        files[f"{base}/JPEGImages/{name}.jpg"] = jpeg(name)
    for name in VOC_TRAIN + VOC_VAL:
        files[f"{base}/SegmentationClass/{name}.png"] = png(mask_of(name, "voc"))
        files[f"{base}/SegmentationObject/{name}.png"] = png(mask_of(name, "object"))
    tar(folder / "VOCtrainval_11-May-2012.tar", files)
    sbd = "benchmark_RELEASE/dataset"
    files = {f"{sbd}/cls/{name}.mat": mat(mask_of(name, "sbd")) for name in SBD_TRAIN + SBD_VAL}
    files |= {f"{sbd}/img/{name}.jpg": jpeg(name) for name in SBD_TRAIN + SBD_VAL}
    files |= {f"{sbd}/train.txt": lines(SBD_TRAIN), f"{sbd}/val.txt": lines(SBD_VAL)}
    files["benchmark_RELEASE/README"] = b"Semantic boundaries"
    tar(folder / "benchmark.tgz", files)
    return folder


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder: /good with ranges, /norange without, /slow in small bits, /cut breaking off, /wrong with other
    bytes, /short with a shorter file, /gone not at all."""

    daemon_threads = True
    requests: list

    def handle_error(self, request, client_address):
        pass  # a killed client


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        _, kind, name = self.path.split("/")
        self.server.requests.append((kind, name, self.headers.get("Range")))
        data = (self.server.folder / name).read_bytes()
        if kind == "gone":
            self.send_error(503)
            return
        if kind == "wrong":
            data = data[:100] + b"?" + data[101:]
        if kind == "short":
            data = data[:-1000]
        start = int(self.headers["Range"][6:-1]) if "Range" in self.headers and kind != "norange" else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        rest = data[start:]
        if kind == "cut":
            rest = rest[: len(rest) // 2]
        for at in range(0, len(rest), 4000 if kind == "slow" else len(rest)):
            self.wfile.write(rest[at : at + 4000] if kind == "slow" else rest)
            if kind == "slow":
                self.wfile.flush()
                time.sleep(0.02)


@pytest.fixture
def server(published):
    instance = Server(("127.0.0.1", 0), Handler)
    instance.folder, instance.requests = published, []
    threading.Thread(target=instance.serve_forever, daemon=True).start()
    yield instance
    instance.shutdown()
    instance.server_close()


@pytest.fixture
def sources(server, published):
    """Sources by kind of mirror: sources("gone", "good") lists two mirrors for each archive."""

    def make(*kinds, counts=None):
        host = f"http://127.0.0.1:{server.server_port}"
        archives = [
            describe(published / name, *(f"{host}/{kind}/{name}" for kind in kinds))
            for name in ("VOCtrainval_11-May-2012.tar", "benchmark.tgz")
        ]
        return Sources(*archives, counts or {"train": 6, "val": 5, "trainaug": TRAINAUG})

    return make


def assert_complete(root):
    """The devkit is right in every file."""
    folder = root / "VOCdevkit" / "VOC2012"
    names = {s: voc.read_list(folder / "ImageSets/Segmentation" / f"{s}.txt") for s in ("train", "val", "trainaug")}
    assert names["train"] == VOC_TRAIN
    assert names["val"] == VOC_VAL
    assert names["trainaug"] == sorted({*VOC_TRAIN, *SBD_TRAIN, *SBD_VAL} - {*VOC_VAL})
    assert len(names["trainaug"]) == TRAINAUG
    assert not set(names["trainaug"]) & set(VOC_VAL)
    for pair in voc.voc_listing(root, split="trainaug").checked() + voc.voc_listing(root, split="val").checked():
        kind = "voc" if pair.image.stem in VOC_TRAIN + VOC_VAL else "sbd"
        np.testing.assert_array_equal(read_mask(pair.mask), mask_of(pair.image.stem, kind))
        assert image_size(pair.image) == SIZE
        with Image.open(pair.mask) as image:
            assert image.mode == "P"
            assert image.getpalette() == voc_palette().ravel().tolist()
    assert not {path.stem for path in (folder / "SegmentationClassAug").iterdir()} & {*VOC_TRAIN, *VOC_VAL}
    assert len(list((folder / "Annotations").iterdir())) == len({*VOC_TRAIN, *VOC_VAL, *SBD_TRAIN, *SBD_VAL})
    left = [path for path in root.rglob("*") if path.name.endswith((".part", ".wrong")) or "benchmark" in path.name]
    assert left == []


class TestSetArithmetic:
    def test_the_real_numbers(self):
        """Lists that overlap as VOC's and SBD's do give 10,582."""
        train, val = set(range(1464)), set(range(1464, 2913))
        # 11,355 images of SBD: 1,464 + 9,118 - 1,464 + those that VOC validates on.
        sbd = [*range(1464), *range(2913, 2913 + 9118), *range(1464, 1464 + 773)]
        assert len(sbd) == 11355
        names = trainaug_names(train, val, sbd[:8498], sbd[8498:])
        assert len(names) == 10582
        assert not set(names) & val

    @given(*[st.sets(st.integers(0, 40)) for _ in range(4)])
    def test_properties(self, train, val, sbd_train, sbd_val):
        names = trainaug_names(train, val, sbd_train, sbd_val)
        assert names == sorted(set(names))
        for name in range(41):
            assert (name in names) == (name not in val and (name in train or name in sbd_train or name in sbd_val))


class TestWhole:
    @pytest.mark.parametrize("workers", [1, 2])
    def test_from_the_server_and_again(self, sources, server, tmp_path, workers):
        first = prepare_voc(tmp_path, sources=sources("good"), workers=workers)
        assert_complete(tmp_path)
        assert first.counts == {"train": 6, "val": 5, "trainaug": TRAINAUG}
        assert first.fresh
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        server.requests.clear()
        again = prepare_voc(tmp_path, sources=sources("good"))
        assert replace(again, fresh=True) == first
        assert not again.fresh
        assert server.requests == []
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert [path.name for path in tmp_path.iterdir()] == ["VOCdevkit"]

    def test_archives_are_kept_on_request(self, sources, published, tmp_path):
        prepare_voc(tmp_path, sources=sources("good"), workers=1, keep_archives=True)
        kept = tmp_path / ".seg_attn_voc"
        assert {path.name for path in kept.iterdir()} == {path.name for path in published.iterdir()}

    def test_from_files(self, sources, server, published, tmp_path):
        prepare_voc(tmp_path, files=sorted(published.iterdir()), sources=sources("gone"), workers=1)
        assert_complete(tmp_path)
        assert server.requests == []
        assert len(list(published.iterdir())) == 2  # the user's files stay

    def test_one_file_given_under_another_name(self, sources, server, published, tmp_path):
        given = tmp_path / "my copy ü.tgz"
        given.write_bytes((published / "benchmark.tgz").read_bytes())
        prepare_voc(tmp_path / "root", files=[given], sources=sources("good"), workers=1)
        assert {name for _, name, _ in server.requests} == {"VOCtrainval_11-May-2012.tar"}

    def test_a_devkit_that_is_there(self, sources, server, published, tmp_path):
        with tarfile.open(published / "VOCtrainval_11-May-2012.tar") as archive:
            archive.extractall(tmp_path, filter="data")
        prepare_voc(tmp_path, sources=sources("good"), workers=1)
        assert_complete(tmp_path)
        assert {name for _, name, _ in server.requests} == {"benchmark.tgz"}

    def test_a_devkit_with_holes_is_filled(self, sources, published, tmp_path):
        with tarfile.open(published / "VOCtrainval_11-May-2012.tar") as archive:
            archive.extractall(tmp_path, filter="data")
        folder = tmp_path / "VOCdevkit" / "VOC2012"
        (folder / "JPEGImages" / f"{VOC_VAL[0]}.jpg").unlink()
        (folder / "notes.txt").write_text("mine")
        prepare_voc(tmp_path, sources=sources("good"), workers=1)
        assert_complete(tmp_path)
        assert (folder / "notes.txt").read_text() == "mine"

    def test_command(self, sources, tmp_path, capsys):
        table = sources("good")
        description = {
            key: {"name": a.name, "urls": list(a.urls), "size": a.size, "md5": a.md5}
            for key, a in (("voc", table.voc), ("sbd", table.sbd))
        }
        (tmp_path / "sources.json").write_text(json.dumps(description | {"counts": table.counts}))
        parser = prepare.argparse.ArgumentParser()
        prepare.add_arguments(parser)
        root = tmp_path / "root"
        args = parser.parse_args([str(root), "--sources", str(tmp_path / "sources.json"), "--workers", "1"])
        assert prepare.run(args) == 0
        assert prepare.run(args) == 0
        out = capsys.readouterr().out
        assert "is ready: " in out
        assert "was ready already: " in out
        assert "  trainaug      19 images\n" in out
        assert "trainaug and val have no image in common" in out


class TestMirrors:
    def test_a_dead_first_mirror(self, sources, server, tmp_path):
        table = sources("good")
        dead = "http://127.0.0.1:9/x"  # the discard port: nobody listens
        table = replace(table, voc=replace(table.voc, urls=(dead, *table.voc.urls)))
        prepare_voc(tmp_path, sources=table, workers=1)
        assert_complete(tmp_path)

    @pytest.mark.parametrize("kinds", [("gone", "good"), ("cut", "good"), ("short", "good"), ("wrong", "good")])
    def test_a_bad_first_mirror(self, sources, tmp_path, kinds):
        prepare_voc(tmp_path, sources=sources(*kinds), workers=1)
        assert_complete(tmp_path)

    def test_what_a_broken_mirror_gave_is_gone_on_with(self, sources, server, tmp_path):
        archive = sources("cut", "good").voc
        assert fetch(archive, tmp_path).read_bytes() == (server.folder / archive.name).read_bytes()
        half = archive.size // 2
        assert server.requests == [
            ("cut", archive.name, None),
            ("cut", archive.name, f"bytes={half}-"),
            ("good", archive.name, f"bytes={half + (archive.size - half) // 2}-"),
        ]

    def test_a_server_without_ranges(self, sources, server, tmp_path):
        archive = sources("norange").sbd
        (tmp_path / "benchmark.tgz.part").write_bytes(b"some old beginning")
        assert fetch(archive, tmp_path).read_bytes() == (server.folder / archive.name).read_bytes()

    def test_a_wrong_beginning_is_found_out(self, sources, server, tmp_path):
        """Part of the file came from a mirror with other bytes: kept aside, and fetched anew."""
        archive = sources("good").sbd
        (tmp_path / "benchmark.tgz.part").write_bytes(b"x" * 500)
        assert fetch(archive, tmp_path).read_bytes() == (server.folder / archive.name).read_bytes()
        assert (tmp_path / "benchmark.tgz.wrong").read_bytes().startswith(b"x" * 500)
        assert [entry[2] for entry in server.requests] == ["bytes=500-", None]

    def test_only_wrong_files(self, sources, tmp_path):
        with pytest.raises(InputError) as caught:
            prepare_voc(tmp_path, sources=sources("wrong", "gone"), workers=1)
        message = str(caught.value)
        aside = tmp_path / ".seg_attn_voc" / "VOCtrainval_11-May-2012.tar.wrong"
        assert aside.is_file()
        assert "its sha256 is " in message
        assert "HTTP 503" in message
        assert f"kept as {aside}" in message
        assert "--from" in message
        assert "\n" not in message
        assert not (tmp_path / "VOCdevkit").exists()

    def test_only_short_files(self, sources, tmp_path):
        archive = sources("short").voc
        with pytest.raises(InputError, match=f"offers {archive.size - 1000:,} bytes instead of {archive.size:,}"):
            fetch(archive, tmp_path)


class TestFiles:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda data: data[:-500], r"not the published benchmark\.tgz, it has .* bytes and should have"),
            (lambda data: data[:50] + b"!" + data[51:], r"not the published benchmark\.tgz, its sha256 is"),
        ],
    )
    def test_wrong_ones_are_named(self, sources, published, tmp_path, change, match):
        given = tmp_path / "benchmark.tgz"
        given.write_bytes(change((published / "benchmark.tgz").read_bytes()))
        with pytest.raises(InputError, match=match) as caught:
            prepare_voc(tmp_path / "root", files=[given], sources=sources("good"))
        assert str(given) in str(caught.value)
        assert not (tmp_path / "root").exists()

    def test_neither_archive(self, sources, tmp_path):
        (tmp_path / "photo.zip").write_bytes(b"PK")
        with pytest.raises(InputError, match=r"photo\.zip: neither VOCtrainval_11-May-2012\.tar"):
            prepare_voc(tmp_path / "root", files=[tmp_path / "photo.zip"], sources=sources("good"))
        with pytest.raises(InputError, match=r"absent: no such file"):
            prepare_voc(tmp_path / "root", files=[tmp_path / "absent"], sources=sources("good"))

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"voc": {"name": "x"}}', '{"voc": 3, "sbd": 4}'])
    def test_a_broken_table(self, tmp_path, content):
        (tmp_path / "s.json").write_text(content)
        with pytest.raises(InputError, match=r"s\.json: not a table of sources"):
            sources_from(tmp_path / "s.json")

    def test_the_published_table(self):
        for archive, size in ((VOC_SOURCES.voc, 1_999_639_040), (VOC_SOURCES.sbd, 1_419_539_633)):
            assert archive.size == size
            assert len(archive.urls) >= 3
            assert all(archive.name in url for url in archive.urls)
            assert len(bytes.fromhex(archive.sha256)) == 32
            assert len(bytes.fromhex(archive.md5)) == 16
        assert VOC_SOURCES.counts == {"train": 1464, "val": 1449, "trainaug": 10582}


def info(name, kind=tarfile.REGTYPE, link=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    member.size = 3 if kind == tarfile.REGTYPE else 0
    return member


class TestUnpacking:
    @pytest.mark.parametrize(
        "member",
        [
            info("VOCdevkit/VOC2012/../../../evil"),
            info("../evil"),
            info("/tmp/evil"),
            info("VOCdevkit\\..\\evil"),
            info("C:/evil"),
            info("VOCdevkit/VOC2012/link", tarfile.SYMTYPE, "/etc/passwd"),
            info("VOCdevkit/VOC2012/link", tarfile.LNKTYPE, "VOCdevkit/VOC2012/a"),
            info("VOCdevkit/VOC2012/fifo", tarfile.FIFOTYPE),
            info("VOCdevkit/VOC2012/device", tarfile.CHRTYPE),
        ],
    )
    @pytest.mark.parametrize("suffix", ["tar", "tgz"])
    def test_what_leads_out_is_refused(self, tmp_path, member, suffix):
        path = tmp_path / f"evil.{suffix}"
        tar(path, {"VOCdevkit/VOC2012/a": b"fine"}, [member])
        outside = set(tmp_path.parent.iterdir())
        with pytest.raises(InputError, match=rf"evil\.{suffix}: refused, its member .*{member.name[-4:]}'"):
            unpack(path, tmp_path / "target", below="VOCdevkit/VOC2012")
        assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {path.name, "a"}
        assert set(tmp_path.parent.iterdir()) == outside

    @pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.99])
    @pytest.mark.parametrize("suffix", ["tar", "tgz"])
    def test_a_truncated_archive(self, tmp_path, suffix, keep):
        path = tmp_path / f"short.{suffix}"
        rng = np.random.default_rng(0)
        tar(path, {f"VOCdevkit/VOC2012/{n}": rng.bytes(3000) for n in range(20)})
        data = path.read_bytes()
        # A tar ends in blocks of zeros; what is cut must be content.
        end = len(data.rstrip(b"\0")) if suffix == "tar" else len(data) - 8
        path.write_bytes(data[: int(keep * end)])
        with pytest.raises(InputError, match=rf"short\.{suffix}: the archive is damaged or cut short"):
            unpack(path, tmp_path / "target", below="VOCdevkit/VOC2012")
        for file in (tmp_path / "target").glob("*"):
            assert file.stat().st_size == 3000

    def test_another_archive(self, tmp_path):
        tar(tmp_path / "other.tar", {"COCO/a": b"x"})
        with pytest.raises(InputError, match=r"other\.tar: holds no folder VOCdevkit/VOC2012"):
            unpack(tmp_path / "other.tar", tmp_path / "target", below="VOCdevkit/VOC2012")

    def test_a_prefix_is_ignored_and_files_in_place_are_left(self, tmp_path):
        """VOC 2011 lies below `TrainVal/`."""
        tar(tmp_path / "a.tar", {"./TrainVal/VOCdevkit/VOC2012/x/y": b"new", "VOCdevkit/VOC2012b/z": b"other"})
        (tmp_path / "target" / "x").mkdir(parents=True)
        (tmp_path / "target" / "x" / "y").write_bytes(b"old")
        unpack(tmp_path / "a.tar", tmp_path / "target", below="VOCdevkit/VOC2012")
        assert (tmp_path / "target" / "x" / "y").read_bytes() == b"old"  # of the right size
        assert [path.name for path in (tmp_path / "target").rglob("*")] == ["x", "y"]

    def test_members_reads_only_what_is_wanted(self, tmp_path):
        tar(tmp_path / "a.tgz", {"a": b"1", "b": b"22"})
        assert list(members(tmp_path / "a.tgz", lambda name, size: size == 2)) == [("b", b"22")]


class TestConversion:
    def test_a_mask(self, tmp_path):
        mask = mask_of("a", "sbd")
        convert_mat(mat(mask), tmp_path / "a.png", tmp_path / "a.jpg")
        np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), mask)

    @pytest.mark.parametrize(
        ("data", "match"),
        [
            (b"", "not one of SBD's masks"),
            (b"MATLAB 5.0 MAT-file" + b"\0" * 200, "not one of SBD's masks"),
            (mat(np.full((3, 4), 21, np.uint8)), "not a mask of VOC's 21 classes"),
            (mat(np.zeros((3, 4))), "not a mask of VOC's 21 classes"),
            (mat(mask_of("a", "sbd"))[:300], "not one of SBD's masks"),
        ],
    )
    def test_a_broken_one_is_named(self, tmp_path, data, match):
        with pytest.raises(InputError, match=rf"^a\.mat: .*{match}") as caught:
            convert_mat(data, tmp_path / "a.png", tmp_path / "a.jpg")
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_a_mask_of_another_size(self, tmp_path):
        (tmp_path / "a.jpg").write_bytes(jpeg("a"))
        with pytest.raises(InputError, match=r"a\.mat: its mask is \(3, 4\), the photograph .*a\.jpg \(30, 40\)"):
            convert_mat(mat(np.zeros((3, 4), np.uint8)), tmp_path / "a.png", tmp_path / "a.jpg")


class TestTrouble:
    def test_a_disk_that_is_too_small(self, sources, tmp_path, monkeypatch):
        table = sources("good")
        monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: os.terminal_size((0, 0)) and Usage(1000))

        class Usage:
            def __init__(self, free):
                self.free = free

        with pytest.raises(InputError, match=r"0\.0 GB are needed and 0\.0 GB are free; free some space"):
            prepare_voc(tmp_path, sources=table)
        assert not (tmp_path / "VOCdevkit").exists()

    @pytest.mark.parametrize("after", [0, 3, 40])
    def test_a_disk_that_fills_up_and_is_emptied(self, sources, tmp_path, monkeypatch, after):
        """The write number `after` fails; with space again, the work goes on where it stopped."""
        original, writes = os.replace, []

        def full(source, target):
            writes.append(target)
            if len(writes) > after:
                raise OSError(errno.ENOSPC, "No space left on device")
            original(source, target)

        monkeypatch.setattr("os.replace", full)
        with pytest.raises(InputError, match="the disk is full; free some space and run again"):
            prepare_voc(tmp_path, sources=sources("good"), workers=1)
        monkeypatch.setattr("os.replace", original)
        prepare_voc(tmp_path, sources=sources("good"), workers=1)
        assert_complete(tmp_path)

    def test_wrong_numbers(self, sources, tmp_path):
        with pytest.raises(InputError, match=r"'trainaug': 19.* and should have .*'trainaug': 20"):
            prepare_voc(tmp_path, sources=sources("good", counts={"trainaug": 20}), workers=1)

    def test_a_leak_is_found(self, sources, tmp_path):
        prepare_voc(tmp_path, sources=sources("good"), workers=1)
        trainaug = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt"
        with trainaug.open("a") as file:
            file.write(f"{VOC_VAL[0]}\n")
        with pytest.raises(InputError, match=rf"trainaug\.txt: holds 1 images of val, such as {VOC_VAL[0]}"):
            prepare_voc(tmp_path, sources=sources("good"))

    def test_two_runs_at_once(self, sources, tmp_path):
        fcntl = pytest.importorskip("fcntl")
        work = tmp_path / ".seg_attn_voc"
        work.mkdir()
        with (work / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(InputError, match="another run prepares this folder"):
                prepare_voc(tmp_path, sources=sources("good"))
        prepare_voc(tmp_path, sources=sources("good"), workers=1)

    def killed_often(self, sources, tmp_path, kills, seed):
        table = sources("slow")
        description = {
            key: {"name": a.name, "urls": list(a.urls), "size": a.size, "sha256": a.sha256}
            for key, a in (("voc", table.voc), ("sbd", table.sbd))
        }
        (tmp_path / "sources.json").write_text(json.dumps(description | {"counts": table.counts}))
        root = tmp_path / "root"
        code = (
            "import argparse, sys; from seg_attn.data import prepare; from seg_attn.data.images import write_bytes\n"
            "import time, seg_attn.data.fetch as fetch\n"
            "def slowly(path, data): time.sleep(0.01); write_bytes(path, data)\n"  # so that kills hit unpacking too
            "fetch.write_bytes = slowly\n"
            "parser = argparse.ArgumentParser(); prepare.add_arguments(parser)\n"
            "print('started', flush=True)\n"
            "sys.exit(prepare.run(parser.parse_args(sys.argv[1:])))"
        )
        command = [sys.executable, "-c", code, str(root), "--sources", str(tmp_path / "sources.json"), "--workers", "1"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        rng = random.Random(seed)
        for _ in range(kills):
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            process.stdout.readline()
            time.sleep(rng.uniform(0.05, 0.9))
            process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            process.communicate()
            for path in root.rglob("*.png"):  # whatever is there is whole
                assert read_mask(path).shape == SIZE
            assert (
                not (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt").exists() or process.returncode == 0
            )
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        assert_complete(root)

    def test_killed_twice(self, sources, tmp_path):
        self.killed_often(sources, tmp_path, kills=2, seed=1)

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("seed", range(3))
    def test_killed_at_ten_random_moments(self, sources, tmp_path, seed):
        self.killed_often(sources, tmp_path, kills=10, seed=seed)
