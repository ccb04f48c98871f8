"""Signed provenance, the registry of pixels, and what is said of pictures from anywhere."""

from __future__ import annotations

import contextlib
import io
import json
import random
import socket
import stat
import threading
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dermaflux.errors import ImageError
from dermaflux.images import SOURCE_TYPE, encode, read_marks
from dermaflux.marks import Keys, Marker, MarksError, Registry, verify
from dermaflux.marks import credentials as signing
from dermaflux.marks import registry as reading
from dermaflux.marks.certificates import made
from dermaflux.marks.credentials import Credentials
from dermaflux.marks.keys import ANCHORS, CHAIN, KEY, WATERMARK, findings
from dermaflux.marks.marking import _decoded, payload, prompt_hash
from dermaflux.marks.registry import RegistryError, pixel_hash
from tests.core.test_marks_watermark import picture

PIXELS = picture(128, 128, seed=4)
RECORD = {"prompt": "a lesion, brown", "seed": "7", "steps": "20", "engine": "fake"}
FORMS = [("png", None), ("jpeg", 90), ("webp", None), ("webp", 80)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("site") / "marks"


@pytest.fixture(scope="module")
def marker(folder: Path) -> Marker:
    return Marker.open(folder, "bundle one")


@pytest.fixture(scope="module")
def files(marker: Marker) -> dict[str, bytes]:
    return {f"{form} {quality}": marker.mark(PIXELS, RECORD, form, quality).data
            for form, quality in FORMS}  # fmt: skip


def resaved(data: bytes, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    with Image.open(io.BytesIO(data)) as one:
        one.convert("RGB").save(stream, form, **options)
    return stream.getvalue()


# --- the manifest


@pytest.mark.parametrize("name", [f"{form} {quality}" for form, quality in FORMS])
def test_a_marked_file_holds_in_every_way(marker, files, name):
    verdict = marker.verify(files[name])
    manifest = verdict.manifest
    assert (manifest.state, manifest.trusted, manifest.problems) == ("valid", True, ())
    assert manifest.source_type == SOURCE_TYPE
    assert manifest.record["pixels_sha256"] == pixel_hash(PIXELS)
    assert (manifest.record["bundle"], manifest.record["seed"]) == ("bundle one", "7")
    assert manifest.record["watermark"] is True
    assert (verdict.known, verdict.shown, verdict.claimed) == (True, True, True)
    assert verdict.watermark.present
    json.dumps(verdict.as_json())


@pytest.mark.parametrize("name", [f"{form} {quality}" for form, quality in FORMS])
def test_signing_keeps_the_pixels_and_the_texts(marker, files, name):
    form, _, quality = name.partition(" ")
    plain = encode(PIXELS, RECORD, form, None if quality == "None" else int(quality))
    bare = marker.mark(
        PIXELS, RECORD, form, None if quality == "None" else int(quality), watermark=False
    )
    with Image.open(io.BytesIO(bare.data)) as signed, Image.open(io.BytesIO(plain)) as unsigned:
        assert np.array_equal(np.asarray(signed), np.asarray(unsigned))
    assert read_marks(bare.data) == read_marks(plain)
    assert 1_000 < len(bare.data) - len(plain) < 6_000, "no thumbnail"


def test_no_prompt_is_signed_but_who_has_it_can_show_it(marker, files):
    record = marker.verify(files["png None"]).manifest.record
    assert "prompt" not in record
    assert record["prompt_hmac_sha256"] == prompt_hash(RECORD["prompt"], marker.keys)
    assert RECORD["prompt"] not in json.dumps(marker.verify(files["png None"]).as_json())


@pytest.mark.parametrize("name", [f"{form} {quality}" for form, quality in FORMS])
def test_a_changed_file_is_told_from_a_changed_manifest(marker, files, name):
    data = files[name]
    whole = marker._credentials.read(data)
    states = set()
    for position in range(20, len(data), 97):
        damaged = bytearray(data)
        damaged[position] ^= 0x55
        manifest = marker._credentials.read(bytes(damaged))
        states.add(manifest.state)
        if manifest.believed:
            assert manifest.record == whole.record, position
        if manifest.state == "valid":
            # A manifest has a kilobyte of padding and names of boxes that nobody signs.
            assert manifest == whole
            with contextlib.suppress(ImageError):  # a PNG's chunk has a checksum besides
                assert read_marks(bytes(damaged)) == read_marks(data)
                assert _decoded(bytes(damaged)) == _decoded(data)
    assert {"edited", "broken"} <= states


def test_a_manifest_copied_into_another_picture_shows_nothing_of_it(marker, files):
    data = files["png None"]
    start = data.index(b"caBX") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    other = encode(picture(128, 128, seed=11), {})
    verdict = marker.verify(other[:33] + chunk + other[33:])
    assert (verdict.manifest.state, verdict.manifest.trusted) == ("edited", True)
    assert verdict.shown is False
    assert any("not of this file" in one for one in verdict.sentences)
    # Around the very pixels that it speaks of, it shows what it says.
    drawn = encode(PIXELS, {})
    exact = marker.verify(drawn[:33] + chunk + drawn[33:])
    assert (exact.manifest.state, exact.exact, exact.shown) == ("edited", True, True)


def test_saving_anew_loses_the_manifest_and_keeps_the_watermark(marker, files):
    verdict = marker.verify(resaved(files["png None"], "JPEG", quality=60))
    assert verdict.manifest.state == "absent"
    assert verdict.known is False
    assert verdict.watermark.present
    assert verdict.shown
    copied = marker.verify(resaved(files["png None"]))
    assert (copied.manifest.state, copied.known) == ("absent", True)


def test_a_signature_of_another_site_is_not_ours(marker, files, tmp_path):
    other = Marker.open(tmp_path / "other", "bundle two")
    verdict = other.verify(files["png None"])
    assert (verdict.manifest.state, verdict.manifest.trusted) == ("valid", False)
    assert (verdict.shown, verdict.claimed, verdict.known) == (False, True, False)
    nobody = verify(files["png None"])
    assert (nobody.manifest.state, nobody.manifest.trusted) == ("valid", False)
    assert (nobody.watermark, nobody.known, nobody.shown) == (None, None, False)
    # Once its authority is among the anchors, it is believed.
    anchors = tmp_path / "other" / "keys" / ANCHORS
    anchors.write_bytes(anchors.read_bytes() + marker.keys.anchors)
    again = Marker.open(tmp_path / "other", "bundle two").verify(files["png None"])
    assert (again.manifest.trusted, again.shown) == (True, True)


def test_a_photograph_that_the_same_authority_signed_is_not_called_drawn(marker, monkeypatch):
    """Under the root of a hospital a camera may sign as well."""
    capture = SOURCE_TYPE.replace("trainedAlgorithmicMedia", "digitalCapture")
    stream = io.BytesIO()
    Image.fromarray(255 - PIXELS).save(stream, "PNG")
    with monkeypatch.context() as patch:
        patch.setattr(signing, "SOURCE_TYPE", capture)
        photograph = marker._credentials.sign(stream.getvalue(), "png", {})
    verdict = marker.verify(photograph, crops=False)
    assert (verdict.manifest.state, verdict.manifest.trusted) == ("valid", True)
    assert (verdict.manifest.source_type, verdict.shown, verdict.claimed) == (capture, False, False)
    assert "nobody says there that a model made it" in verdict.sentences[0]


def test_pixels_as_drawn_are_recognised_after_all_is_lost(marker):
    marked = marker.mark(PIXELS, RECORD, watermark=False)
    assert (marked.pixels_sha256, marked.shown_sha256) == (pixel_hash(PIXELS),) * 2
    assert marked.watermark_psnr_db is None
    verdict = marker.verify(marked.data)
    assert not verdict.watermark.present
    assert any("very ones that were drawn" in one for one in verdict.sentences)
    assert marker.verify(encode(PIXELS, {})).known is True


def test_the_watermark_names_the_bundle(marker):
    large = marker.mark(picture(256, 256), RECORD)
    assert marker.verify(large.data).watermark.payload == payload("bundle one")


def test_a_piece_is_told_as_one(marker, files):
    with Image.open(io.BytesIO(files["png None"])) as whole:
        stream = io.BytesIO()
        whole.crop((10, 4, 122, 116)).save(stream, "PNG")
    verdict = marker.verify(stream.getvalue())
    assert verdict.shown
    assert verdict.as_json()["piece_of"] == {"height": 128, "width": 128, "top": 4, "left": 10}
    assert marker.verify(stream.getvalue(), crops=False).shown is False


def test_signing_and_reading_from_many_threads(marker):
    wrong: list[object] = []

    def work(seed: int) -> None:
        data = marker.mark(PIXELS, {"seed": str(seed)}, "jpeg", 90, watermark=False).data
        manifest = marker._credentials.read(data)
        if (manifest.state, manifest.record["seed"]) != ("valid", str(seed)):
            wrong.append(manifest)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- hostile files


def test_no_file_asks_the_network():
    """A picture may name an address for its manifest; whoever sends it must not make us call."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/manifest.c2pa"
        xmp = (
            '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-'
            'rdf-syntax-ns#"><rdf:Description rdf:about="" xmlns:dcterms="http://purl.org/dc/terms/"'
            f' dcterms:provenance="{address}"/></rdf:RDF></x:xmpmeta>'
        )
        stream = io.BytesIO()
        Image.fromarray(PIXELS).save(stream, "JPEG", xmp=xmp.encode())
        assert Credentials().read(stream.getvalue()).state == "absent"
        assert "it names one elsewhere" in verify(stream.getvalue()).sentences[0]
        with pytest.raises(BlockingIOError):
            server.accept()


def test_damaged_files_are_refused_or_judged_and_nothing_else(marker, files):
    dice = random.Random(0)
    for name, data in files.items():
        for _ in range(40):
            damaged = bytearray(data)
            for _ in range(dice.choice((1, 3, 30))):
                damaged[dice.randrange(len(damaged))] = dice.randrange(256)
            end = len(damaged) if dice.random() < 0.6 else dice.randrange(len(damaged))
            whole = bytes(damaged[:end])
            marker._credentials.read(whole)
            try:
                verdict = marker.verify(whole, crops=False)
            except ImageError:
                continue
            assert verdict.sentences, name


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(60), bytes(500)])
def test_what_is_no_picture_is_refused(marker, data):
    with pytest.raises(ImageError):
        marker.verify(data)


def test_texts_that_nest_without_end_are_no_record(marker):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", f'dermaflux:record="{"[" * 200_000}"')
    stream = io.BytesIO()
    Image.fromarray(255 - PIXELS).save(stream, "PNG", pnginfo=info)
    assert read_marks(stream.getvalue()) == {}
    assert not marker.verify(stream.getvalue(), crops=False).shown


def test_words_say_no_chance_of_zero_and_no_authenticity(marker, files):
    for data in (files["png None"], resaved(files["png None"], "JPEG", quality=95)):
        words = " ".join(marker.verify(data).sentences)
        assert "The watermark is there (score" in words
        assert "at most 1e-30" in words
        assert "authentic" not in words.lower()
    turned = io.BytesIO()
    with Image.open(io.BytesIO(files["png None"])) as one:
        one.convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(turned, "PNG")
    words = " ".join(marker.verify(turned.getvalue()).sentences)
    assert "The watermark is there, the picture flipped left to right (score" in words


def test_bombs_are_refused_before_they_are_unpacked(marker):
    stream = io.BytesIO()
    Image.new("L", (9000, 9000)).save(stream, "PNG")
    with pytest.raises(ImageError, match="use at most"):
        marker.verify(stream.getvalue())


# --- keys


def test_keys_are_made_once_and_are_private(tmp_path):
    folder = tmp_path / "keys"
    folder.mkdir()  # as whoever prepares a volume does
    keys = Keys.open(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in (CHAIN, KEY, ANCHORS, WATERMARK):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    assert Keys.open(folder) == keys
    assert keys.key.decode() not in repr(keys)
    assert keys.watermark[0].hex() not in repr(keys)
    assert list(tmp_path.iterdir()) == [folder], "nothing is left beside it"
    with pytest.raises(MarksError, match="cannot be read"):
        Keys.open(tmp_path / "none", make=False)


def _opened(folder: Path) -> bytes:
    return Keys.open(folder).key


def test_workers_that_start_together_share_one_key(tmp_path):
    with get_context("spawn").Pool(3) as pool:
        keys = pool.map(_opened, [tmp_path / "marks" / "keys"] * 6)
    assert len(set(keys)) == 1


def test_the_sites_own_certificate_takes_the_place(tmp_path):
    marker = Marker.open(tmp_path, "one")
    before = marker.mark(PIXELS, RECORD).data
    chain, authority, key = made(datetime.now(UTC))
    folder = tmp_path / "keys"
    (folder / CHAIN).write_bytes(chain)
    with pytest.raises(MarksError, match="not that of the first certificate"):
        Marker.open(tmp_path, "one")
    (folder / KEY).write_bytes(key)
    with pytest.raises(MarksError, match="not among the anchors"):
        Marker.open(tmp_path, "one")
    (folder / ANCHORS).write_bytes((folder / ANCHORS).read_bytes() + authority)
    renewed = Marker.open(tmp_path, "one")
    for data in (before, renewed.mark(PIXELS, RECORD).data):
        manifest = renewed.verify(data).manifest
        assert (manifest.state, manifest.trusted) == ("valid", True)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (CHAIN, b"", "no certificates"),
        (CHAIN, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "no cert"),
        (KEY, b"junk", "PEM without a password"),
        (ANCHORS, b"junk", ANCHORS),
        (WATERMARK, b"", "1 to 16 lines"),
        (WATERMARK, b"xyz\n", "hexadecimal"),
        (WATERMARK, b"00ff\n", "32 or more"),
    ],
)
def test_wrong_keys_are_refused_in_words(tmp_path, name, content, words):
    Keys.open(tmp_path / "keys")
    (tmp_path / "keys" / name).write_bytes(content)
    with pytest.raises(MarksError, match=words):
        Keys.open(tmp_path / "keys")
    assert [one.state for one in findings(tmp_path / "keys")] == ["fail"]


def test_an_expired_certificate_signs_nothing_and_what_it_signed_is_told(tmp_path):
    Keys.open(tmp_path / "keys")
    chain, authority, key = made(datetime.now(UTC) - timedelta(days=365 * 11))
    for name, content in ((CHAIN, chain), (ANCHORS, authority), (KEY, key)):
        (tmp_path / "keys" / name).write_bytes(content)
    with pytest.raises(MarksError, match="set the clock"):
        Marker.open(tmp_path, "one")


def test_the_doctor_speaks_of_keys_before_they_end(tmp_path):
    folder = tmp_path / "keys"
    assert [one.state for one in findings(folder)] == ["note"]
    ends = Keys.open(folder).signer.not_after
    assert [one.state for one in findings(folder)] == ["ok"]
    assert [one.state for one in findings(folder, ends - timedelta(days=30))] == ["note"]
    assert [one.state for one in findings(folder, ends + timedelta(days=1))] == ["fail"]
    (folder / KEY).chmod(0o644)
    found = findings(folder)
    assert [one.state for one in found] == ["ok", "note"]
    assert "chmod 600" in found[1].words


# --- the registry


def test_hashes_are_known_once_added(tmp_path):
    registry = Registry(tmp_path / "pixels.sha256")
    one, two = pixel_hash(PIXELS), pixel_hash(PIXELS[::-1])
    assert not registry.known(one)
    registry.add(one)
    assert (registry.known(one), registry.known(two)) == (True, False)
    assert not registry.known(one[:63])
    assert not registry.known(one.upper())
    registry.add(two)
    assert Registry(registry.path).known(two)


def test_a_line_that_was_cut_off_harms_no_other(tmp_path):
    registry = Registry(tmp_path / "pixels.sha256")
    hashes = [pixel_hash(PIXELS + np.uint8(step)) for step in range(3)]
    registry.add(hashes[0], hashes[1])
    registry.path.write_bytes(registry.path.read_bytes()[:-10])
    registry.add(hashes[2])
    assert [registry.known(one) for one in hashes] == [True, False, True]


@pytest.mark.parametrize("block", [1, 7, 65, 66, 100])
def test_hashes_are_found_wherever_a_block_ends(tmp_path, monkeypatch, block):
    monkeypatch.setattr(reading, "_BLOCK", block)
    registry = Registry(tmp_path / "pixels.sha256")
    hashes = [pixel_hash(PIXELS + np.uint8(step)) for step in range(6)]
    registry.add(*hashes)
    assert all(map(registry.known, hashes))
    assert not registry.known(hashes[1][32:] + hashes[2][:32])
    assert not registry.known("0" * 64)


def test_a_registry_that_takes_no_more_is_an_error(tmp_path):
    registry = Registry(tmp_path / "none" / "pixels.sha256")
    with pytest.raises(RegistryError, match="takes no more"):
        registry.add(pixel_hash(PIXELS))
