"""Features depend on picture, weights, timesteps and draw, and on nothing else; the cache gives back what was
computed.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from progidiff.errors import GeometryError, ModelError, RequestError
from progidiff.testing import build_tiny_denoiser, build_tiny_model
from progidiff.textdiff.data import PictureCase
from progidiff.textdiff.feature_cache import CachedFeatures, FeatureCache
from progidiff.textdiff.features import PATTERNS, DiffusionFeatures, FeatureOptions
from progidiff.textdiff.model import load_textdiff
from progidiff.textdiff.pictures import read_picture
from progidiff.textdiff.train import train_textdiff
from support.toy_textdiff import toy

PICTURE = torch.rand((1, 3, 32, 48), generator=torch.Generator().manual_seed(0)) * 2 - 1


def load(denoiser: Path, **options: object) -> DiffusionFeatures:
    return DiffusionFeatures.load(denoiser, FeatureOptions(**options), "cpu")


def test_shapes_are_those_that_are_announced(denoiser: Path):
    extractor = load(denoiser, timesteps=(50, 150), blocks=(0, 2, 3), picture=True)
    maps = extractor(PICTURE)
    assert extractor.channels == (32, 32, 19)
    assert extractor.strides == (8, 2, 1)
    assert [tuple(m.shape) for m in maps] == [
        (1, c, 32 // s, 48 // s) for c, s in zip(extractor.channels, extractor.strides, strict=True)
    ]
    assert torch.equal(maps[-1][:, -3:], PICTURE)


def test_features_are_the_activations_before_the_upsampler(denoiser: Path):
    extractor = load(denoiser, timesteps=(50,), blocks=(0, 3))
    seen = {}
    unet = extractor._unet
    handles = [
        unet.up_blocks[0].resnets[-1].register_forward_hook(lambda *a: seen.__setitem__(0, a[2])),
        unet.up_blocks[3].register_forward_hook(lambda *a: seen.__setitem__(3, a[2])),
    ]
    maps = extractor(PICTURE)
    for handle in handles:
        handle.remove()
    assert torch.equal(maps[0], seen[0].float())
    assert torch.equal(maps[1], seen[3].float())


def test_timesteps_are_joined_on_channels(denoiser: Path):
    both = load(denoiser, timesteps=(50, 250))(PICTURE)
    one, other = (load(denoiser, timesteps=(t,))(PICTURE) for t in (50, 250))
    for joined, first, second in zip(both, one, other, strict=True):
        assert torch.equal(joined, torch.cat([first, second], dim=1))


def test_draws_differ_and_a_draw_repeats(denoiser: Path):
    extractor = load(denoiser, timesteps=(150,))
    first, again, other = extractor(PICTURE, 0), extractor(PICTURE, 0), extractor(PICTURE, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.allclose(first[-1], other[-1], atol=1e-3)
    assert not torch.allclose(first[-1], load(denoiser, timesteps=(150,), seed=1)(PICTURE, 0)[-1], atol=1e-3)


def test_the_noise_of_a_place_does_not_depend_on_the_size_of_the_picture(denoiser: Path):
    extractor = load(denoiser)
    small, large = extractor._tile_noise(0, PICTURE), extractor._tile_noise(0, torch.zeros(2, 3, 600, 40))
    assert torch.equal(large[0, :, :32, :40], small[0, :, :, :40])
    assert torch.equal(large[0, :, 256:512], large[0, :, :256])
    assert torch.equal(large[0], large[1])


def test_jitter_shifts_the_timesteps_of_later_draws_only(denoiser: Path):
    extractor = load(denoiser, timesteps=(50, 900), jitter=0.2)
    assert extractor.pick_timesteps(0) == [50, 900]
    shifted = extractor.pick_timesteps(1)
    assert shifted != [50, 900]
    assert shifted == extractor.pick_timesteps(1)
    assert all(abs(s / t - 1) <= 0.21 and 0 <= s <= 999 for s, t in zip(shifted, (50, 900), strict=True))


def test_the_key_tells_weights_and_options_apart_but_not_resolution_or_number_of_draws(denoiser: Path, tmp_path: Path):
    key = load(denoiser).key
    assert load(denoiser, scale=None, size=64, draws=4).key == key
    keys = {key, load(denoiser, timesteps=(50,)).key, load(denoiser, seed=1).key, load(denoiser, picture=True).key}
    keys.add(load(build_tiny_denoiser(tmp_path / "other", seed=1)).key)
    assert len(keys) == 5
    shutil.copytree(denoiser, tmp_path / "moved")
    assert load(tmp_path / "moved").key == key


def test_a_latent_denoiser_gives_features_at_its_strides(tmp_path: Path):
    backbone = build_tiny_model(tmp_path / "model") / "backbone"
    extractor = load(backbone, timesteps=(50,), blocks=(0, 1), picture=True)
    maps = extractor(PICTURE)
    assert extractor.strides == (16, 8, 1)
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 2, 3), (32, 4, 6), (3, 32, 48)]
    assert all(torch.isfinite(m).all() for m in maps)
    assert not torch.allclose(maps[0], extractor(-PICTURE)[0])


def test_a_head_on_a_latent_denoiser_is_trained_saved_and_loaded(cases: list[PictureCase], tmp_path: Path):
    backbone = build_tiny_model(tmp_path / "model") / "backbone"
    options = FeatureOptions(timesteps=(50,), blocks=(0, 1), scale=1.0, picture=True)
    config = toy(steps=2, features=options, use_text=False, views=1)
    trained = train_textdiff(
        cases[:1], denoiser=backbone, out=tmp_path / "heads" / "1", work=tmp_path / "work", config=config, device="cpu"
    ).model
    model = load_textdiff(tmp_path / "heads" / "1", "cpu")
    assert model.extractor.strides == model.card.head.strides == (16, 8, 1)
    picture = read_picture(cases[1].image)
    found, expected = model.predict(picture, draws=2), trained.predict(picture, draws=2)
    assert found.masks.shape == (2, 48, 48)
    # The head is kept as fp16.
    assert abs(found.probabilities - expected.probabilities).max() < 0.02
    assert found.probabilities.std() > 0


def test_a_denoiser_of_a_hub_is_fetched_and_one_that_cannot_be_says_how_to_do_without(
    denoiser: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "owner/gone":
            raise OSError("no route to the hub")
        return str(denoiser)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    extractor = DiffusionFeatures.load("owner/name", device="cpu")
    assert (extractor.source, extractor.folder, extractor.key) == ("owner/name", denoiser, load(denoiser).key)
    assert asked == [("owner/name", list(PATTERNS))]
    with pytest.raises(
        ModelError, match="could not be fetched from the model hub .*no route to the hub.*give its folder"
    ):
        DiffusionFeatures.load("owner/gone", device="cpu")
    with pytest.raises(ModelError, match="does not exist"):
        DiffusionFeatures.load("too/many/parts", device="cpu")
    assert len(asked) == 2


def test_options_that_fit_no_network_are_refused(denoiser: Path):
    with pytest.raises(RequestError, match="has blocks 0 to 3"):
        load(denoiser, blocks=(0, 4))
    with pytest.raises(RequestError, match="timesteps 0 to 999"):
        load(denoiser, timesteps=(1000,))
    with pytest.raises(RequestError, match=r"one of features\.scale"):
        load(denoiser, size=64)
    for tone in ((0.1, 0.2, 0.3), (0, 0, 0, 1, 1, 0), (2, 0, 0, 1, 1, 1)):
        with pytest.raises(RequestError, match="three means"):
            load(denoiser, tone=tone)
    with pytest.raises(RequestError, match="ascending"):
        load(denoiser, blocks=(1, 0))
    with pytest.raises(GeometryError, match="pad them first"):
        load(denoiser)(PICTURE[..., :30])


def test_folders_that_hold_no_denoiser_are_refused(denoiser: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="does not exist"):
        load(tmp_path / "none")
    with pytest.raises(ModelError, match=r"config\.json' is missing"):
        load(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(denoiser, copy)
    config = json.loads((copy / "unet" / "config.json").read_text(encoding="utf-8"))
    (copy / "unet" / "config.json").write_text(json.dumps({**config, "_class_name": "VQModel"}), encoding="utf-8")
    with pytest.raises(ModelError, match="textdiff convert"):
        load(copy)
    (copy / "unet" / "config.json").write_text(json.dumps({**config, "num_class_embeds": 10}), encoding="utf-8")
    with pytest.raises(ModelError, match="wants a class label"):
        load(copy)
    (copy / "unet" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (copy / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ModelError, match="how it was noised is unknown"):
        load(copy)
    weights = next((copy / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(copy)
    weights.unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        load(copy)


class Counting:
    def __init__(self, extractor: DiffusionFeatures) -> None:
        self._extractor, self.calls = extractor, 0
        self.channels, self.strides, self.options, self.key = (
            extractor.channels,
            extractor.strides,
            extractor.options,
            extractor.key,
        )

    def __call__(self, pictures: torch.Tensor, draw: int = 0) -> list[torch.Tensor]:
        self.calls += 1
        return self._extractor(pictures, draw)


@pytest.fixture
def counting(extractor: DiffusionFeatures) -> Counting:
    return Counting(extractor)


def test_the_cache_computes_once_and_gives_the_same(counting: Counting, tmp_path: Path):
    cache = FeatureCache(tmp_path / "features")
    picture = PICTURE[0, :, :29, :41]
    first, again = cache.get(counting, picture), FeatureCache(tmp_path / "features").get(counting, picture)
    assert counting.calls == 1
    assert [tuple(f.shape[1:]) for f in first] == [(4, 6), (8, 12), (16, 24), (32, 48)]
    for a, b, direct in zip(
        first, again, counting(torch.nn.functional.pad(picture[None], (0, 7, 0, 3), mode="reflect")), strict=True
    ):
        assert a.dtype == torch.float16
        assert torch.equal(a, b)
        assert torch.allclose(a.float(), direct[0], atol=2e-3, rtol=2e-3)


def test_another_picture_draw_or_key_is_another_entry(counting: Counting, tmp_path: Path):
    cache = FeatureCache(tmp_path)
    cache.get(counting, PICTURE[0])
    cache.get(counting, PICTURE[0], 1)
    cache.get(counting, PICTURE[0] + 0.01)
    counting.key = "other"
    cache.get(counting, PICTURE[0])
    assert counting.calls == 4
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_a_damaged_entry_is_computed_again(counting: Counting, tmp_path: Path):
    cache = FeatureCache(tmp_path)
    first = cache.get(counting, PICTURE[0])
    path = next(tmp_path.glob("*.safetensors"))
    expected = [f.clone() for f in first]
    del first
    path.write_bytes(path.read_bytes()[:100])
    again = cache.get(counting, PICTURE[0])
    assert counting.calls == 2
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_beyond_its_limit_the_cache_drops_what_was_not_used_for_longest(counting: Counting, tmp_path: Path):
    cache = FeatureCache(tmp_path)
    for draw in range(3):
        cache.get(counting, PICTURE[0], draw)
    entries = sorted(tmp_path.glob("*.safetensors"), key=lambda p: p.stat().st_mtime_ns)
    size = entries[0].stat().st_size
    for age, path in enumerate(entries):
        os.utime(path, (1000 + age, 1000 + age))
    cache.limit_gb = 2.5 * size / 1e9
    cache.get(counting, PICTURE[0], 3)
    left = set(tmp_path.glob("*.safetensors"))
    assert len(left) == 2
    assert entries[2] in left


def test_without_a_folder_nothing_is_kept(counting: Counting):
    cache = FeatureCache(None)
    cache.get(counting, PICTURE[0])
    cache.get(counting, PICTURE[0])
    assert counting.calls == 2


def test_cached_features_stand_in_for_their_extractor(counting: Counting, tmp_path: Path):
    cached = CachedFeatures(counting, FeatureCache(tmp_path))
    pictures = torch.cat([PICTURE, -PICTURE])
    for found, direct in zip(cached(pictures), counting(pictures), strict=True):
        assert found.shape == direct.shape
        assert torch.allclose(found, direct, atol=2e-3, rtol=2e-2)
