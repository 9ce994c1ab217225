"""Bytes of weights that steps are counted to have read."""

from anybit.engine.weight_traffic import WeightTraffic


def traffic() -> WeightTraffic:
    return WeightTraffic({2: 20, 4: 40, 8: 80}, {2: 3, 4: 3, 8: 4}, 10)


def test_each_width_reads_its_own_weights_and_the_head_is_read_once() -> None:
    counted = traffic()
    counted.record_step([8, 2, 2], used_head=True)
    counted.record_step([4], used_head=False)
    assert counted.bytes_read == {2: 20, 4: 40, 8: 90}


def test_in_one_pass_the_codes_of_the_widest_are_read_and_all_float_parts() -> None:
    counted = traffic()
    counted.record_step([2, 4, 8], used_head=True, in_one_pass=True)
    assert counted.bytes_read == {2: 3, 4: 3, 8: 90}
    counted.record_step([4], used_head=True, in_one_pass=True)
    assert counted.bytes_read[4] == 3 + 50
