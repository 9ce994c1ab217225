"""How a step is laid out: rows, segments, places in the cache, attention groups, rows that need logits."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.engine.batch import plan_batch
from anybit.engine.chunk import Chunk
from anybit.engine.precision import Precision
from anybit.engine.sequence import Sequence
from tests.fixtures.engine import make_request


def sequence_at(name, num_tokens, num_computed=0, bit_width=4, pages=(), **sampling):
    """A sequence whose token at position p is 1000·(its name) + p."""
    token_ids = [1000 * int(name) + position for position in range(num_tokens)]
    request = make_request(name, token_ids, bit_width=bit_width, **sampling)
    sequence = Sequence(request, arrived_at=0.0)
    sequence.num_computed = num_computed
    sequence.pages = list(pages) or [100 * int(name) + page for page in range(num_tokens // 64 + 1)]
    return sequence


def test_rows_are_ordered_by_width_and_then_by_arrival():
    chunks = [
        Chunk(sequence_at("1", 2, bit_width=8), 2),
        Chunk(sequence_at("2", 1, bit_width=2), 1),
        Chunk(sequence_at("3", 3, bit_width=8), 3),
        Chunk(sequence_at("4", 2, bit_width=4), 2),
        Chunk(sequence_at("5", 1, bit_width=2), 1),
    ]
    plan = plan_batch(chunks)
    assert plan.segments == ((2, 0, 2), (4, 2, 4), (8, 4, 9))
    assert plan.token_ids.tolist() == [2000, 5000, 4000, 4001, 1000, 1001, 3000, 3001, 3002]
    assert plan.positions.tolist() == [0, 0, 0, 1, 0, 1, 0, 1, 2]
    assert plan.sampled == tuple(chunks[index].sequence for index in (1, 4, 3, 0, 2))
    assert plan.sampled_rows.tolist() == [0, 1, 3, 5, 8]


def test_at_least_a_width_is_the_widest_that_the_step_needs_anyway():
    lifted, narrow = Precision(3, at_least=True), Chunk(sequence_at("1", 2, bit_width=2), 2)
    chunks = [Chunk(sequence_at("2", 1, bit_width=lifted), 1), narrow]
    assert plan_batch(chunks).segments == ((2, 0, 2), (3, 2, 3))
    wide = Chunk(sequence_at("3", 1, bit_width=8), 1)
    plan = plan_batch([*chunks, wide])
    assert plan.segments == ((2, 0, 2), (8, 2, 4))
    assert plan.token_ids.tolist() == [1000, 1001, 2000, 3000]
    alone = [Chunk(sequence_at(str(n), 1, bit_width=Precision(n, at_least=True)), 1) for n in (2, 4)]
    assert plan_batch(alone).segments == ((4, 0, 2),)


def test_one_width_is_one_segment():
    plan = plan_batch([Chunk(sequence_at(str(n), n), n) for n in (1, 2, 3)])
    assert plan.segments == ((4, 0, 6),)


def test_rows_go_to_the_page_and_offset_of_their_position():
    plan = plan_batch([Chunk(sequence_at("1", 131, 62, pages=(7, 3, 9)), 69)])
    assert plan.positions.tolist() == list(range(62, 131))
    assert plan.token_ids.tolist() == [1000 + position for position in range(62, 131)]
    assert plan.page_ids.tolist() == [7] * 2 + [3] * 64 + [9] * 3
    assert plan.page_offsets.tolist() == [62, 63, *range(64), 0, 1, 2]


def test_only_chunks_that_reach_the_newest_token_are_sampled():
    halfway, done = sequence_at("1", 10), sequence_at("2", 10, 4)
    plan = plan_batch([Chunk(halfway, 5), Chunk(done, 6)])
    assert not Chunk(halfway, 5).completes
    assert plan.sampled == (done,)
    assert plan.sampled_rows.tolist() == [10]


def test_a_step_of_unfinished_prompts_samples_nothing():
    plan = plan_batch([Chunk(sequence_at("1", 10), 5)])
    assert plan.sampled == ()
    assert plan.sampled_rows.tolist() == []


def test_scored_rows_are_those_whose_next_prompt_token_is_known_and_not_yet_scored():
    first, rest = (sequence_at("1", 10, num_prompt_logprobs=0) for _ in range(2))
    (rows,) = plan_batch([Chunk(sequence_at("2", 3, bit_width=2), 3), Chunk(first, 6)]).scored
    assert (rows.sequence, rows.row_ids.tolist(), rows.token_ids) == (
        first,
        [3, 4, 5, 6, 7, 8],
        list(range(1001, 1007)),
    )
    rest.num_computed = rest.num_scored = 6
    (rows,) = plan_batch([Chunk(rest, 4)]).scored
    assert (rows.row_ids.tolist(), rows.token_ids) == ([0, 1, 2], [1007, 1008, 1009])  # nothing follows the last one
    rest.num_computed, rest.num_scored = 0, 9  # preempted when all was told
    assert plan_batch([Chunk(rest, 10)]).scored == ()


def test_decoding_sequences_of_all_widths_are_attended_together():
    chunks = [
        Chunk(sequence_at("1", 200, 199, bit_width=8, pages=(11, 12, 13, 14)), 1),
        Chunk(sequence_at("2", 64, 63, bit_width=2, pages=(21, 22)), 1),
        Chunk(sequence_at("3", 66, 65, bit_width=4, pages=(31, 32)), 1),
    ]
    (group,) = plan_batch(chunks).attention_groups
    assert group.row_ids.tolist() == [[0], [1], [2]]
    assert group.positions.tolist() == [[63], [65], [199]]
    assert [row[:count] for row, count in zip(group.block_tables.tolist(), (1, 2, 4), strict=True)] == [
        [21],
        [31, 32],
        [11, 12, 13, 14],
    ]
    # What pads a table must be a page that the sequence owns: another's might hold anything.
    assert group.block_tables.tolist()[0][1:] == [21] * 3
    assert group.block_tables.tolist()[1][2:] == [31] * 2


def test_prompts_are_attended_one_by_one_even_if_equally_long():
    chunks = [Chunk(sequence_at("1", 70, 5), 65), Chunk(sequence_at("2", 65), 65), Chunk(sequence_at("3", 9, 8), 1)]
    groups = plan_batch(chunks).attention_groups
    assert [group.row_ids.shape for group in groups] == [(1, 65), (1, 65), (1, 1)]
    assert groups[0].positions.tolist() == [list(range(5, 70))]
    assert groups[0].block_tables.tolist() == [[100, 101]]
    assert groups[1].row_ids.tolist() == [list(range(65, 130))]
    assert groups[2].row_ids.tolist() == [[130]]


chunk_shapes = st.tuples(st.integers(0, 150), st.integers(1, 80), st.integers(0, 5), st.sampled_from((2, 3, 4, 6, 8)))


@settings(max_examples=60, deadline=None)
@given(st.lists(chunk_shapes, min_size=1, max_size=8))
def test_every_row_has_one_width_one_place_and_one_attention_group(shapes):
    chunks = [
        Chunk(sequence_at(str(index), computed + count + left, computed, width), count)
        for index, (computed, count, left, width) in enumerate(shapes)
    ]
    plan = plan_batch(chunks)
    rows = sum(chunk.num_tokens for chunk in chunks)
    # By the token a row is: each knows the sequence and position it belongs to.
    for row, token in enumerate(plan.token_ids.tolist()):
        index, position = divmod(token, 1000)
        (width,) = [width for width, start, stop in plan.segments if start <= row < stop]
        assert width == shapes[index][3]
        assert plan.positions[row] == position
        assert plan.page_ids[row] == chunks[index].sequence.pages[position // 64]
        assert plan.page_offsets[row] == position % 64
    assert [stop for _, _, stop in plan.segments][-1] == rows
    assert sorted(width for width, _, _ in plan.segments) == sorted({width for *_, width in shapes})
    attended = torch.cat([group.row_ids.flatten() for group in plan.attention_groups])
    assert sorted(attended.tolist()) == list(range(rows))
    for group in plan.attention_groups:
        assert torch.equal(group.positions, plan.positions[group.row_ids])
        for row_ids, table in zip(group.row_ids.tolist(), group.block_tables.tolist(), strict=True):
            pages = chunks[int(plan.token_ids[row_ids[0]]) // 1000].sequence.pages
            needed = int(plan.positions[row_ids[-1]]) // 64 + 1
            assert table[:needed] == pages[:needed]
            assert set(table) <= set(pages)
    assert {id(sequence) for sequence in plan.sampled} == {id(chunk.sequence) for chunk in chunks if chunk.completes}
