"""PagedKVCache against a model in which every sequence is a plain list of tokens."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from moesaic.cache import CacheFull, PagedKVCache

NUM_BLOCKS, BLOCK_SIZE = 9, 3


def make(**changes):
    sizes = dict(num_layers=2, num_blocks=4, num_kv_heads=1, head_dim=2, block_size=4)
    return PagedKVCache(**(sizes | changes))


class Machine(RuleBasedStateMachine):
    """Random appends, forks, truncations and frees; tokens are numbered so that each is unique."""

    names = Bundle("names")

    def __init__(self):
        super().__init__()
        self.cache = make(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, head_dim_v=3)
        self.tokens: dict[int, list[float]] = {}
        self.created = 0
        self.written = 0

    def write(self, step, count):
        """What reshape_and_cache does, with each token's number as its key and value."""
        values = torch.arange(self.written, self.written + count, dtype=torch.float32)
        self.written += count
        for pages in (*self.cache.k, *self.cache.v):
            pages.flatten(0, 1)[step.slot_mapping] = values[:, None, None]
        return values.tolist()

    @rule(target=names)
    def allocate(self):
        self.created += 1
        self.cache.allocate(self.created)
        self.tokens[self.created] = []
        return self.created

    @rule(target=names, parent=names)
    def fork(self, parent):
        self.created += 1
        self.cache.fork(parent, self.created)
        self.tokens[self.created] = list(self.tokens[parent])
        return self.created

    @rule(batch=st.dictionaries(names, st.integers(0, 7), max_size=3))
    def append(self, batch):
        free, before = self.cache.num_free_blocks, {n: self.cache.pages(n) for n in self.tokens}
        try:
            step = self.cache.append(batch)
        except CacheFull:
            assert self.cache.num_free_blocks == free
            assert {n: self.cache.pages(n) for n in self.tokens} == before
            assert {n: self.cache.length(n) for n in self.tokens} == {
                n: len(t) for n, t in self.tokens.items()
            }
            return
        new = self.write(step, sum(batch.values()))
        for name, count in batch.items():
            self.tokens[name] += new[:count]
            new = new[count:]
        assert step.seq_lens.tolist() == [len(self.tokens[n]) for n in batch]
        assert step.block_table.tolist() == self.cache.block_table(batch).tolist()
        assert (step.cu_seqlens_q is None) == all(c == 1 for c in batch.values())
        if step.cu_seqlens_q is not None:
            assert step.cu_seqlens_q.diff().tolist() == list(batch.values())

    @rule(name=names, data=st.data())
    def truncate(self, name, data):
        length = data.draw(st.integers(0, len(self.tokens[name])))
        self.cache.truncate(name, length)
        del self.tokens[name][length:]

    @rule(target=names, name=consumes(names))
    def free(self, name):
        self.cache.free(name)
        del self.tokens[name]
        return multiple()

    @invariant()
    def holds(self):
        self.cache.check()
        assert self.cache.sequences() == tuple(self.tokens)
        used = NUM_BLOCKS - self.cache.num_free_blocks
        assert self.cache.nbytes_used == used * self.cache.block_nbytes
        for name, tokens in self.tokens.items():
            slots = self.cache.slot_mapping(name)
            table = self.cache.block_table([name])[0]
            for pages in (*self.cache.k, *self.cache.v):
                assert pages.flatten(0, 1)[slots][:, 0, -1].tolist() == tokens
                by_table = pages[table[table >= 0].long()].flatten(0, 1)[: len(tokens), 0, 0]
                assert by_table.tolist() == tokens


TestAgainstLists = Machine.TestCase
TestAgainstLists.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much],
)  # fmt: skip


def test_append_uses_every_page_and_then_refuses():
    cache = make()
    cache.allocate("a")
    cache.append({"a": 16})
    with pytest.raises(CacheFull, match="at most 0 new pages of 4 tokens, got 1"):
        cache.append({"a": 1})
    cache.check()


def test_of_two_writing_forks_one_keeps_the_shared_page():
    cache = make(num_blocks=2)
    cache.allocate("a")
    cache.append({"a": 2})
    cache.fork("a", "b")
    cache.append({"a": 1, "b": 1})  # one copy is enough for both
    assert cache.num_free_blocks == 0
    cache.check()


def test_bytes():
    cache = make(dtype=torch.bfloat16, head_dim_v=6)
    assert cache.block_nbytes == 2 * 4 * (2 + 6) * 2
    assert cache.nbytes == sum(t.nbytes for t in (*cache.k, *cache.v))
    cache.allocate(0)
    assert cache.nbytes_used == 0
    cache.append({0: 5})
    assert cache.nbytes_used == 2 * cache.block_nbytes


def test_check_notices_a_lost_page():
    cache = make()
    cache._free.pop()
    with pytest.raises(RuntimeError, match="free list"):
        cache.check()


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda c: make(num_blocks=0), ValueError, "num_blocks: expected an int >= 1, got 0"),
        (lambda c: make(block_size=1.5), TypeError, "block_size: expected an int, got float"),
        (lambda c: c.allocate("a"), ValueError, "allocate: sequence: expected a new name"),
        (lambda c: c.append({"a": -1}), ValueError, "append: counts: expected ints >= 0, got -1"),
        (lambda c: c.append({"z": 1}), ValueError, r"one of the sequences alive \('a'\), got 'z'"),
        (lambda c: c.truncate("a", 4), ValueError, "truncate: length: expected 0 to 3, got 4"),
        (lambda c: c.slot_mapping("a", 2, 9), ValueError, "0 <= start <= end <= 3, got 2 and 9"),
        (lambda c: c.free("z"), ValueError, "free: sequence"),
    ],
)
def test_errors(act, error, message):
    cache = make()
    cache.allocate("a")
    cache.append({"a": 3})
    with pytest.raises(error, match=message):
        act(cache)
    cache.check()
