"""Every family against Transformers: prompt and cached decode, through the one decoder."""

import json

import pytest
import torch

from anybit.engine.models.registry import parse_config
from tests.fixtures.engine import cached_logits
from tests.fixtures.tiny_families import FAMILIES, GEMMA3_ROPES, tiny_family
from tests.fixtures.tiny_llama import dense_decoder, save_llama


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def pair(request, tmp_path_factory):
    model = tiny_family(*request.param)
    return model, save_llama(model, tmp_path_factory.mktemp("family"))


def test_decoder_gives_the_logits_of_transformers_for_a_prompt_and_from_the_cache(pair):
    model, directory = pair
    decoder = dense_decoder(directory)
    token_ids = torch.randint(512, (100,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(token_ids[None]).logits[0]
    assert expected.abs().max() > 1
    assert (cached_logits(decoder, token_ids.tolist(), 90) - expected).abs().max() < 1e-4
    assert (cached_logits(decoder, token_ids.tolist()[:8], 1) - expected[:8]).abs().max() < 1e-4


def test_gemma3_configs_written_by_older_libraries_mean_the_same(tmp_path):
    model = tiny_family(*FAMILIES["gemma3"])
    new = json.loads((save_llama(model, tmp_path / "model") / "config.json").read_text())
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "layer_types")}
    full = GEMMA3_ROPES["full_attention"]
    old |= {
        "rope_theta": full["rope_theta"],
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": full["factor"]},
        "sliding_window_pattern": 2,
    }
    assert parse_config(old) == parse_config(new)
