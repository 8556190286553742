"""inference.engine.latency: how many candidates fit a deadline, by what was measured."""

from inference.engine.latency import LatencyModel


def test_a_chunk_is_as_large_as_the_time_allows():
    latency = LatencyModel(16)
    assert latency.chunk_size(100, False, 16, 1.0) == 16, "nothing is known yet"
    latency.record_sampling(1, False, 16, 16.0)
    assert latency.chunk_size(100, False, 16, 1000.0) == 16
    assert latency.chunk_size(100, False, 16, 70.0) == 4, "at worst in proportion"
    assert latency.chunk_size(3, False, 16, 1000.0) == 3, "no more than are wanted"
    assert latency.chunk_size(100, True, 16, 70.0) == 2, "guidance takes two passes"
    assert latency.chunk_size(100, False, 16, 0.5) == 1
    latency.record_sampling(16, False, 16, 20.0)
    assert latency.chunk_size(100, False, 16, 30.0) == 16, "measured"
    latency.record_finishing(1, 1.0)
    assert latency.chunk_size(100, False, 16, 30.0) == 8, "decoding counts too"
    assert latency.chunk_size(100, False, 16, 30.0, decodes=4) == 2, "and so do previews"
