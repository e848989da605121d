"""Trees of drafted tokens."""

import pytest
import torch

from specforge.algorithms.base import DraftRequest, Proposal, TreeShape
from specforge.algorithms.eagle3.tree import TreeGrowth, largest

MLA = {
    "architecture": "mla",
    "num_key_value_heads": 4,
    "head_dim": 10,
    "q_lora_rank": 12,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}


def tree(proposer, tokens, aux, shape: TreeShape) -> Proposal:
    return proposer.propose(tokens, {"aux": aux}, DraftRequest(shape.num_nodes, tree=shape))


def path_to(proposal: Proposal, node: int) -> list[int]:
    """Tokens from the child of the root to ``node``."""
    path: list[int] = []
    while node != -1:
        path.append(proposal.tokens[node])
        node = proposal.parents[node]
    return path[::-1]


def exhaustive_tree(proposer, tokens, aux, shape: TreeShape) -> dict[tuple[int, ...], float]:
    """Score of every path that the algorithm may keep, each decoded as a chain of its own."""
    targets = proposer.draft.d2t + torch.arange(proposer.draft.d2t.numel())

    def children(path):
        proposer.reset()
        logits = proposer.append_true_rows(aux, tokens[1:])
        for token in path:
            logits = proposer.speculate(token)
        best = torch.log_softmax(logits, -1).topk(min(shape.top_k, logits.numel()))
        return zip(targets[best.indices].tolist(), best.values.tolist(), strict=True)

    level = {(token,): score for token, score in children(())}
    scores = dict(level)
    for _ in range(shape.depth):
        beam = sorted(level, key=lambda path: -level[path])[: shape.top_k]
        level = {(*path, token): level[path] + score for path in beam for token, score in children(path)}
        scores |= level
    return scores


@pytest.mark.parametrize("shape", [TreeShape(3, 2, 10), TreeShape(4, 3, 24), TreeShape(2, 4, 5), TreeShape(3, 0, 4)])
@pytest.mark.parametrize("changes", [{"draft_vocab_size": 13}, {"norm_output": True}, MLA], ids=["llama", "3.1", "mla"])
def test_a_tree_holds_the_best_of_the_paths_that_chains_would_decode(lab, eagle3, shape, changes):
    """Oracle 47. Ancestors are closed and there are ``num_nodes - 1`` nodes."""
    algorithm, tables = eagle3(), lab.tables()
    draft, document = lab.draft(algorithm, tables, **changes), lab.document(9)
    ids, aux = document["ids"].tolist(), document["aux"][:8]
    proposal = tree(algorithm.proposer(draft, tables), ids, aux, shape)
    scores = exhaustive_tree(algorithm.proposer(draft, tables), ids, aux, shape)
    assert len(proposal.tokens) == len(proposal.parents) == min(shape.num_nodes - 1, len(scores))
    assert all(parent < node for node, parent in enumerate(proposal.parents))
    assert proposal.probabilities is None
    paths = [tuple(path_to(proposal, node)) for node in range(len(proposal.tokens))]
    expected = sorted(scores, key=lambda path: -scores[path])[: shape.num_nodes - 1]
    assert len(set(paths)) == len(paths)
    assert set(paths) == set(expected)


@pytest.mark.parametrize("changes", [{"draft_vocab_size": 13}, MLA], ids=["llama", "mla"])
def test_a_tree_with_one_child_a_node_is_the_greedy_chain(lab, eagle3, changes):
    """Oracle 47. The special case of one child."""
    algorithm, tables = eagle3(), lab.tables()
    document = lab.document(9)
    ids, aux = document["ids"].tolist(), document["aux"][:8]
    proposer = algorithm.proposer(lab.draft(algorithm, tables, **changes), tables)
    proposal = tree(proposer, ids, aux, TreeShape(top_k=1, depth=4, num_nodes=6))
    assert proposal.tokens == proposer.propose(ids, {"aux": aux[:0]}, DraftRequest(5)).tokens
    assert proposal.parents == (-1, 0, 1, 2, 3)


def test_trees_do_not_depend_on_how_features_arrive_or_on_earlier_speculation(lab, eagle3):
    algorithm, tables, shape = eagle3(), lab.tables(), TreeShape(3, 3, 12)
    draft, document = lab.draft(algorithm, tables), lab.document(300)
    ids, aux = document["ids"].tolist(), document["aux"]
    whole = tree(algorithm.proposer(draft, tables), ids, aux[:299], shape)
    proposer = algorithm.proposer(draft, tables)
    tree(proposer, ids[:250], aux[:249], shape)
    proposer.propose(ids[:254], {"aux": aux[249:253]}, DraftRequest(4))
    tree(proposer, ids[:256], aux[253:255], shape)
    assert tree(proposer, ids, aux[255:299], shape) == whole


def test_a_tree_may_have_more_children_a_node_than_the_draft_has_tokens(lab, eagle3):
    algorithm, tables = eagle3(), lab.tables()
    draft, document = lab.draft(algorithm, tables, draft_vocab_size=2), lab.document(5)
    ids, aux = document["ids"].tolist(), document["aux"][:4]
    proposal = tree(algorithm.proposer(draft, tables), ids, aux, TreeShape(top_k=5, depth=1, num_nodes=60))
    assert len(proposal.tokens) == 2 + 4
    assert tree(algorithm.proposer(draft, tables), ids, aux, TreeShape(5, 1, 1)) == Proposal((), None, ())


def test_ties_go_to_the_lower_token_and_to_the_earlier_candidate():
    values, columns = largest(torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0, 3.0]]), 3)
    assert columns.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert values.tolist() == [[2.0, 1.0, 1.0], [3.0, 3.0, 3.0]]
    growth = TreeGrowth(TreeShape(top_k=2, depth=1, num_nodes=5))
    even = torch.full((1, 4), 0.25).log()
    beam = growth.extend(even)
    assert (beam.tokens.tolist(), beam.visible.tolist()) == ([0, 1], [[True, False], [False, True]])
    beam = growth.extend(even.expand(2, -1))
    assert beam.sources.tolist() == [0, 0]
    assert beam.visible.tolist() == [[True, False, True, False], [True, False, False, True]]
    nodes, parents = growth.best_nodes()
    assert (nodes.tolist(), parents) == ([0, 1, 0, 1], (-1, -1, 0, 0))


def test_a_draft_that_diverged_still_gives_a_tree():
    growth = TreeGrowth(TreeShape(top_k=2, depth=1, num_nodes=4))
    growth.extend(torch.full((1, 4), torch.nan))
    growth.extend(torch.full((2, 4), torch.nan))
    nodes, parents = growth.best_nodes()
    assert len(nodes) == 3
    assert all(parent < node for node, parent in enumerate(parents))
