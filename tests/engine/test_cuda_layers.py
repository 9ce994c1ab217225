"""A decoder's layers on the GPU against the portable ones, family by family, and rows against their batch."""

import json

import pytest
import torch

from anybit.engine.batch import plan_batch
from anybit.engine.chunk import Chunk
from anybit.engine.models.cuda_layers import CudaLayers
from anybit.engine.quantize.run import QuantizeOptions, quantize
from anybit.engine.sequence import Sequence
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.huggingface_source import HuggingFaceSource
from anybit.engine.weights.loader import DenseLoader, NestedLoader
from anybit.kernels import fallbacks
from anybit.kernels.layout import BIT_WIDTHS
from anybit.kvcache.pool import KVPool
from anybit.kvcache.spec import KVSpec
from tests.fixtures.engine import cached_logits, make_request
from tests.fixtures.tiny_families import FAMILIES, tiny_family
from tests.fixtures.tiny_llama import decoder_of, save_llama, tiny_llama

pytestmark = pytest.mark.gpu

TOKENS = torch.randint(4, 500, (150,), generator=torch.Generator().manual_seed(7)).tolist()
SHAPE = {"hidden_size": 192, "intermediate_size": 320, "head_dim": 64}


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def checkpoint(request, tmp_path_factory):
    model_type, overrides = request.param
    source = HuggingFaceSource(
        save_llama(tiny_family(model_type, {**overrides, **SHAPE}), tmp_path_factory.mktemp("family"))
    )
    directory = tmp_path_factory.mktemp("checkpoint")
    quantize(source, directory, QuantizeOptions(method="rtn"))
    return directory


def decoder_from(checkpoint, device):
    config = json.loads((checkpoint / "config.json").read_text())
    return decoder_of(config, NestedLoader(CheckpointReader(checkpoint), BIT_WIDTHS, 8, device), device)


@pytest.fixture(scope="module")
def decoder(checkpoint):
    return decoder_from(checkpoint, "cuda")


@torch.inference_mode()
def test_the_gpu_computes_what_the_cpu_does(checkpoint, decoder):
    assert isinstance(decoder.native, CudaLayers)
    before = fallbacks.snapshot()
    on_cpu = decoder_from(checkpoint, "cpu")
    for width in BIT_WIDTHS:
        expected = cached_logits(on_cpu, TOKENS, 120, width, "bf16")
        got = cached_logits(decoder, TOKENS, 120, width, "bf16").cpu()
        # Keys and values are rounded to 8 bits, and now and then to the other side.
        assert (got - expected).norm() < 2e-2 * expected.norm()
    assert {key for key in fallbacks.snapshot() if key.startswith("cuda")} == {
        key for key in before if key.startswith("cuda")
    }


@torch.inference_mode()
@pytest.mark.parametrize("kv_format", ["qet4", "qet2", "qet2+2@2", "qet4/qet3", "uniform8"])
def test_the_gpu_reads_sealed_pages_as_the_cpu_does(checkpoint, decoder, kv_format):
    on_cpu = decoder_from(checkpoint, "cpu")
    expected = cached_logits(on_cpu, TOKENS, 70, 8, kv_format)
    got = cached_logits(decoder, TOKENS, 70, 8, kv_format).cpu()
    exact = cached_logits(on_cpu, TOKENS, 70, 8, "bf16")
    # Pages are encoded from numbers that differ a little, so now and then another code is nearest.
    assert (got - expected).norm() < max(3e-2 * exact.norm(), 0.5 * (expected - exact).norm())


@torch.inference_mode()
@pytest.mark.parametrize("kv_format", ["qet4", "qet2", "uniform8"])
def test_chunks_change_no_bit_of_what_follows_sealed_pages(decoder, kv_format):
    alone = cached_logits(decoder, TOKENS, 120, 4, kv_format)
    for prompt in (1, 64, 77, 150):
        assert torch.equal(cached_logits(decoder, TOKENS, prompt, 4, kv_format), alone)


@torch.inference_mode()
def test_chunks_and_batch_mates_change_no_bit(decoder):
    alone = {width: cached_logits(decoder, TOKENS, 120, width, "bf16") for width in (2, 4, 8)}
    for width in alone:
        assert torch.equal(cached_logits(decoder, TOKENS[:140], 77, width, "bf16"), alone[width][:140])
    config = decoder.config
    pool = KVPool(KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, "bf16"), 40, decoder.device)
    sequences = []
    for index, (width, length) in enumerate([(8, 101), (2, 33), (4, 64), (2, 130), (4, 1), (8, 7)]):
        sequence = Sequence(make_request(str(index), TOKENS[:length], bit_width=width), arrived_at=0.0)
        sequence.pages = list(range(3 * index, 3 * index + 3))
        sequences.append(sequence)
    prompts = plan_batch([Chunk(sequence, len(sequence.token_ids)) for sequence in sequences], decoder.device)
    hidden = decoder.forward(prompts, pool)
    for sequence, row in zip(prompts.sampled, decoder.logits(hidden[prompts.sampled_rows]), strict=True):
        assert torch.equal(row, alone[sequence.bit_width][len(sequence.token_ids) - 1])
        sequence.num_computed = len(sequence.token_ids)
        sequence.token_ids.append(TOKENS[len(sequence.token_ids)])
    steps = plan_batch([Chunk(sequence, 1) for sequence in sequences], decoder.device)
    for sequence, row in zip(steps.sampled, decoder.logits(decoder.forward(steps, pool)), strict=True):
        assert torch.equal(row, alone[sequence.bit_width][len(sequence.token_ids) - 1])


@torch.inference_mode()
def test_prompts_in_fast_mode_lose_little_more_than_reproducible_ones(checkpoint, decoder):
    config = json.loads((checkpoint / "config.json").read_text())
    reproducible, fast = (
        decoder_of(
            config, NestedLoader(CheckpointReader(checkpoint), BIT_WIDTHS, 8, "cuda"), "cuda", torch.bfloat16, is_fast
        )
        for is_fast in (False, True)
    )
    assert [reproducible.native.is_fast, fast.native.is_fast] == [False, True]
    for width in (2, 4, 8):
        expected = cached_logits(decoder, TOKENS, 140, width, "bf16")
        exact, got = (cached_logits(one, TOKENS, 140, width, "bf16") for one in (reproducible, fast))
        assert not torch.equal(got[:140], exact[:140])
        assert (got - expected).norm() < 3 * (exact - expected).norm()  # weights are rounded to bfloat16


@torch.inference_mode()
def test_unquantized_weights_go_through_the_same_layers(tmp_path):
    model = tiny_llama(**SHAPE)
    source = HuggingFaceSource(save_llama(model, tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    on_gpu = decoder_of(config, DenseLoader(source, torch.bfloat16, "cuda"), "cuda", dtype=torch.bfloat16)
    assert isinstance(on_gpu.native, CudaLayers)
    expected = cached_logits(decoder_of(config, DenseLoader(source), "cpu"), TOKENS, 120, 8, "bf16")
    got = cached_logits(on_gpu, TOKENS, 120, 8, "bf16").cpu()
    assert (got - expected).norm() < 6e-2 * expected.norm()  # bfloat16's rounding leaves .04
