"""Squares of parts of samples' gradients: what is kept until ranks have added them up, and what becomes of it."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lipcore.models.tensor_parallel import PartRanks
from lipcore.per_sample import part_rows
from lipcore.per_sample.part_rows import PartRows, PassRows, bits_of, check_part_rows, observe_whole, unlike_row

RANKS = PartRanks((0, 1), 0, None, {"a.weight": 0}, frozenset({"a.weight"}))
OTHER = PartRanks((0, 1), 1, None, {"a.weight": 0}, frozenset({"a.weight"}))


def rows_of(total: Sequence[float], ids: Sequence[int] | None = None, alike: float = 1.0) -> PassRows:
    """Squares of a layer and in total, and of one that is alike."""
    squares = torch.tensor([total, total], dtype=torch.float64)
    same = torch.full((1, len(total)), alike, dtype=torch.float64)
    named = None if ids is None else torch.tensor(ids)
    return PassRows(squares, same, ["norm"], named, None)


def add_up(*of_ranks: PassRows) -> None:
    """What a sum over two ranks does."""
    partials = [rows.partial(RANKS) for rows in of_ranks]
    total = torch.stack([partial.number for partial in partials]).sum(0)
    for partial in partials:
        partial.take(total, partial.number)


def kept() -> PartRows:
    return PartRows(RANKS, 2, 1)


class Scores:
    """Norms by id, as they come."""

    def __init__(self) -> None:
        self.found: dict[int, float] = {}

    def __call__(self, rows: PassRows) -> None:
        assert rows.ids is not None
        self.found |= dict(zip(rows.ids.tolist(), rows.norms().tolist(), strict=True))


def test_the_norm_is_the_root_of_the_sum() -> None:
    mine, theirs = rows_of([9.0, 4.0]), rows_of([16.0, 0.0])
    add_up(mine, theirs)
    assert mine.whole
    assert mine.unlike == ""
    assert mine.norms().tolist() == theirs.norms().tolist() == [5.0, 2.0]
    (layer, total) = observe_whole([mine], 2)
    assert (total.count, total.max, total.min) == (2, 5.0, 2.0)
    assert layer.count == 2


@pytest.mark.parametrize(("other", "unlike"), [(1.0, ""), (1.001, ""), (1.2, "norm"), (0.0, "norm")])
def test_what_ranks_hold_alike_is_compared(other: float, unlike: str) -> None:
    mine, theirs = rows_of([1.0]), rows_of([1.0], alike=other)
    add_up(mine, theirs)
    assert mine.unlike == theirs.unlike == unlike


def test_rows_without_numbers_are_alike() -> None:
    nothing = torch.full((1, 2), torch.nan)
    assert unlike_row(nothing, nothing, 2) == -1
    assert unlike_row(torch.zeros(1, 2), torch.zeros(1, 2), 2) == -1


def test_scores_get_samples_when_they_are_whole() -> None:
    rows, scores = kept(), Scores()
    first, second = rows_of([9.0], [7]), rows_of([1.0], [8])
    rows.add(first)
    rows.add(second)
    rows.score(scores)
    assert scores.found == {}
    assert rows.waiting == [first, second]
    add_up(first, rows_of([16.0]))
    rows.score(scores)
    assert scores.found == {7: 5.0}
    assert rows.waiting == [second]
    rows.reset()  # the window is over, and its samples still come to the scores
    add_up(second, rows_of([0.0]))
    rows.score(scores)
    assert scores.found == {7: 5.0, 8: 1.0}


def test_taking_back_keeps_what_came_before_the_mark() -> None:
    rows, scores = kept(), Scores()
    right, wrong = rows_of([9.0], [7]), rows_of([1.0], [8])
    rows.add(right)
    rows.mark()
    rows.add(wrong)
    add_up(right, rows_of([0.0]))
    add_up(wrong, rows_of([0.0]))
    rows.score(scores)
    assert set(scores.found) == {7, 8}
    again = Scores()  # as they were at the mark
    rows.take_back(again)
    assert again.found == {7: 3.0}
    assert rows.window() == [right]


def test_a_sliding_window_has_its_blocks() -> None:
    rows = PartRows(RANKS, 2, 2)
    for number in range(4):
        rows.add(rows_of([float(number)]))
        assert [float(each.squares[-1]) for each in rows.window()] == list(range(max(0, number - 1), number + 1))
        rows.advance()


def test_memory_is_bounded(monkeypatch: Any) -> None:
    monkeypatch.setattr(part_rows, "_MOST_BYTES", 100)
    rows = kept()
    for number in range(6):
        rows.add(rows_of([1.0], [number]))
    assert "more than 64 MiB of single samples' squares" in rows.off
    assert rows.window() == []
    assert rows.tell_lost().startswith("lipcore's scores by id lack 2 samples: ")
    assert rows.tell_lost() == ""
    assert [each.ids.tolist() for each in rows.waiting if each.ids is not None] == [[2], [3], [4], [5]]
    rows.reset()
    assert rows.off == ""


def test_a_state_has_the_window() -> None:
    rows, again, scores = kept(), kept(), Scores()
    first, second = rows_of([9.0, 1.0], [7, 9]), rows_of([4.0])
    rows.add(first)
    rows.add(second)
    add_up(first, rows_of([0.0, 0.0]))
    state = rows.state_dict()
    check_part_rows(state, again)
    again.load_state_dict(state)
    assert bits_of(again.window()) == bits_of(rows.window())
    for old, new in zip(rows.window(), again.window(), strict=True):
        assert torch.equal(old.squares, new.squares)
        assert (old.whole, old.unlike, old.layers) == (new.whole, new.unlike, new.layers)
    again.score(scores)
    assert scores.found == {7: 3.0, 9: 1.0}


@pytest.mark.parametrize(("into", "words"), [
    (None, "this rank holds whole"),
    (PartRows(OTHER, 2, 1), "part 0 of 2 .* this rank holds part 1 of 2"),
    (PartRows(RANKS, 3, 1), r"in_parts.squares: expected torch.float64 \[3, \*\], got"),
])  # fmt: skip
def test_a_state_of_other_parts_is_refused(into: PartRows | None, words: str) -> None:
    rows = kept()
    rows.add(rows_of([1.0]))
    with pytest.raises(ValueError, match=words):
        check_part_rows(rows.state_dict(), into)


def test_ranks_with_other_samples_have_other_bits() -> None:
    assert bits_of([rows_of([1.0], [3])]) == bits_of([rows_of([2.0], [3])])
    others = [rows_of([1.0], [4]), rows_of([1.0, 2.0]), rows_of([1.0])]
    assert len({tuple(bits_of([rows])) for rows in others}) == 3
    assert bits_of([]) == bits_of([])


def test_squares_that_do_not_add_up_have_no_score() -> None:
    rows, scores = kept(), Scores()
    first, second = rows_of([9.0], [7]), rows_of([1.0], [8])
    rows.add(first)
    rows.add(second)
    add_up(first, rows_of([0.0], alike=0.0))
    add_up(second, rows_of([0.0]))
    rows.score(scores)
    assert scores.found == {8: 1.0}
    assert rows.waiting == []


def test_what_ranks_never_can_add_up_is_given_up() -> None:
    rows, scores = kept(), Scores()
    other, right = rows_of([9.0], [7]), rows_of([1.0], [8])
    rows.add(other)
    rows.give_up_waiting()
    rows.add(right)
    assert rows.waiting == [right]
    assert rows.window() == [other, right]
    assert rows.state_dict()["scored"] == [True, False]
    add_up(right, rows_of([0.0]))
    rows.score(scores)
    assert scores.found == {8: 1.0}


def test_what_was_scored_is_kept_for_a_failed_proof_alone() -> None:
    rows = kept()
    for number in range(4):
        rows.add(each := rows_of([1.0], [number]))
        if number == 1:
            rows.mark()
        else:
            add_up(each, rows_of([0.0]))
        rows.score(Scores())
    assert rows._scored == []
    rows.mark()
    (before,) = rows.waiting
    add_up(before, rows_of([0.0]))
    rows.score(Scores())
    assert rows._scored == [before]


def test_a_state_has_what_waits_of_windows_before() -> None:
    rows, again, scores = kept(), kept(), Scores()
    rows.add(rows_of([9.0], [7]))
    rows.reset()
    rows.add(rows_of([1.0], [8]))
    state = rows.state_dict()
    check_part_rows(state, again)
    again.load_state_dict(state)
    assert [float(each.squares[-1]) for each in again.window()] == [1.0]
    for each in again.waiting:
        add_up(each, rows_of([0.0]))
    again.score(scores)
    assert scores.found == {7: 3.0, 8: 1.0}


def test_other_layers_lose_no_score() -> None:
    rows, others, scores = kept(), PartRows(RANKS, 3, 1), Scores()
    rows.add(first := rows_of([9.0], [7]))
    others.go_on_scoring(rows)
    assert others.waiting == [first]
    check_part_rows(others.state_dict(), others)
    add_up(first, rows_of([0.0]))
    others.score(scores)
    assert scores.found == {7: 3.0}
    assert others.window() == []


def test_the_cost_of_a_pass_does_not_grow(monkeypatch: Any) -> None:
    rows, counted = kept(), []
    monkeypatch.setattr(part_rows, "_bytes", lambda of: counted.append(of) or 0)
    for number in range(10):
        rows.add(rows_of([1.0], [number]))
    assert counted == []


def test_a_copy_of_the_ranks_has_no_process_group() -> None:
    ranks = PartRanks((0, 1), 0, Unpicklable(), {}, frozenset())
    again = pickle.loads(pickle.dumps(ranks))
    assert (again, again.handle) == (ranks, None)


class Unpicklable:
    """As a process group is."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle")


def test_a_sliding_window_is_off_as_long_as_a_block_lacks_rows(monkeypatch: Any) -> None:
    monkeypatch.setattr(part_rows, "_MOST_BYTES", 3 * rows_of([1.0]).nbytes)
    rows, kept_now = PartRows(RANKS, 2, 3), []
    for number in range(8):
        for _ in range(4 if number == 1 else 1):
            rows.add(rows_of([float(number)]))
        kept_now.append((bool(rows.off), len(rows.window())))
        rows.advance()
    assert [off for off, _ in kept_now] == [False, True, True, True, False, False, False, False]
    assert [count for off, count in kept_now if not off] == [1, 3, 3, 3, 3]


@pytest.mark.parametrize(("wrong", "words"), [
    ({"whole": []}, "lists of the same length"),
    ({"blocks": 0}, "expected a count of blocks"),
    ({"block": [3]}, "expected one of 1 blocks, got 3"),
    ({"squares": [torch.zeros(2, 1)]}, "in_parts.squares: expected torch.float64"),
    ({"alike": [torch.zeros(5, 1, dtype=torch.float64)]}, "in_parts.alike: expected torch.float64"),
])  # fmt: skip
def test_a_state_that_does_not_fit_changes_nothing(wrong: dict[str, Any], words: str) -> None:
    rows = kept()
    rows.add(rows_of([1.0]))
    with pytest.raises(ValueError, match=words):
        check_part_rows(rows.state_dict() | wrong, rows)
    assert len(rows.window()) == 1
