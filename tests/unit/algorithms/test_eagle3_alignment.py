"""Which rows are supervised, on which tokens, with which teacher."""

import pytest
import torch

from specforge.algorithms.eagle3.features import plan_unroll, row_weights
from specforge.algorithms.parts.alignment import supervised_rows


def rows_of(supervised):
    return supervised.nonzero().squeeze(-1).tolist()


@pytest.fixture
def worked_example(lab, pack):
    """Tokens U U U A0 A1 A2 A3 E, the last entry of the mask zeroed as SpecForge's offline data has it."""
    document = lab.document(8, answer_from=3)
    document["mask"][7] = False
    return document, pack


def test_strict_alignment_supervises_the_rows_that_predict_answer_tokens(worked_example):
    """Rows 1 to 4 predict A0 to A3; with the end-of-turn token in the mask, row 5 predicts it."""
    document, pack = worked_example
    assert rows_of(supervised_rows(pack([document]), 1, 2)[0]) == [1, 2, 3, 4]
    document["mask"][7] = True
    assert rows_of(supervised_rows(pack([document]), 1, 2)[0]) == [1, 2, 3, 4, 5]


def test_offset_zero_supervises_the_rows_of_the_worked_example(worked_example):
    document, pack = worked_example
    assert rows_of(supervised_rows(pack([document]), 1, 0)[0]) == [3, 4, 5, 6]


def test_the_worked_example_embeds_and_teaches_what_its_table_says(worked_example):
    """Row j of step k, computed also where only a later step is supervised: token j + 1 + k is embedded and teaches."""
    document, pack = worked_example
    document["mask"][7] = True
    batch = pack([document])
    for offset, rows in ((2, [0, 1, 2, 3, 4, 5]), (0, [1, 2, 3, 4, 5, 6])):
        plan, supervision = plan_unroll(batch, supervised_rows(batch, 3, offset))
        assert plan.context[plan.rows].tolist() == rows
        for k in range(3):
            assert supervision.teachers[k].clamp(max=7).tolist() == [min(j + 1 + k, 7) for j in rows]
            assert plan.tokens[k].tolist() == [min(j + 1 + k, 8) for j in rows]
            reached = [j + max(offset, 1) + k < 8 and bool(document["mask"][j + offset + k]) for j in rows]
            assert supervision.mask[k].tolist() == reached
        assert plan.positions[plan.rows].tolist() == rows


def test_offset_one_is_off_by_one_token(worked_example):
    document, pack = worked_example
    document["mask"][7] = True
    assert rows_of(supervised_rows(pack([document]), 1, 1)[0]) == [2, 3, 4, 5, 6]


def test_offset_zero_needs_a_teacher_inside_the_document(lab, pack):
    document = lab.document(5, answer_from=0)
    assert rows_of(supervised_rows(pack([document]), 2, 0)[0]) == [0, 1, 2, 3]
    assert rows_of(supervised_rows(pack([document]), 2, 0)[1]) == [0, 1, 2]


def test_counts_of_the_worked_masks(lab, pack):
    """Oracle 11."""
    first, second = lab.document(16), lab.document(12)
    first["mask"] = torch.tensor([4 <= j <= 14 for j in range(16)])
    second["mask"] = torch.tensor([2 <= j <= 5 or 8 <= j <= 10 for j in range(12)])
    assert supervised_rows(pack([first, second]), 7, 0).sum(1).tolist() == [18, 18, 18, 17, 16, 14, 12]


def test_no_step_reaches_over_the_end_of_a_document(lab, pack):
    batch = pack([lab.document(6, 0), lab.document(7, 0), lab.document(1, 0)])
    supervised = supervised_rows(batch, 4, 2)
    plan, supervision = plan_unroll(batch, torch.ones_like(supervised))
    assert plan.rows.tolist() == plan.context.tolist() == list(range(14))
    for k in range(4):
        for column, j in enumerate(plan.rows.tolist()):
            inside = j + 1 + k < 14 and batch.document_ids[min(j + 1 + k, 13)] == batch.document_ids[j]
            assert plan.tokens[k, column] == (j + 1 + k if inside else 14)
            if supervised[k, j]:
                assert batch.document_ids[supervision.teachers[k, column]] == batch.document_ids[j]
                assert supervision.teachers[k, column] == j + 1 + k


def test_only_rows_that_are_supervised_at_some_step_are_computed(lab, pack):
    batch = pack([lab.document(20, 15), lab.document(9, 9)])
    plan, _ = plan_unroll(batch, supervised_rows(batch, 3, 2))
    assert plan.context.tolist() == list(range(18))
    assert plan.rows.tolist() == list(range(11, 18))


@pytest.mark.parametrize(("normalisation", "weight"), [("token_mean", 9), ("sample_mean", 2), ("micro_batch_mean", 1)])
def test_supervised_weight_is_what_the_normalisation_divides_by(
    lab, pack, eagle3, empty_batch, context, normalisation, weight
):
    algorithm = eagle3(normalisation=normalisation)
    batch = pack([lab.document(10, 4), lab.document(8, 5), lab.document(2, 0)])
    assert algorithm.supervised_weight(batch, context) == weight
    assert algorithm.supervised_weight(pack([lab.document(2, 0)]), context) == 0
    assert algorithm.supervised_weight(empty_batch, context) == 0


def test_row_weights_of_every_normalisation_add_up_to_its_divisor(lab, pack):
    batch = pack([lab.document(10, 4), lab.document(4, 4), lab.document(8, 5)])
    first = supervised_rows(batch, 1, 2)[0]
    expected = {
        "token_mean": (1.0, 1.0, 9.0),
        "sample_mean": (1 / 6, 1 / 3, 2.0),
        "micro_batch_mean": (1 / 9, 1 / 9, 1.0),
    }
    for normalisation, (long, short, divisor) in expected.items():
        weights, total = row_weights(batch, first, normalisation)
        assert weights[first].tolist() == pytest.approx([long] * 6 + [short] * 3)
        assert total == divisor
