"""Feature sets of random evaluation samples of a world, for the tests of the evaluator."""

from itertools import pairwise

from specforge.contracts.tasks import PromptTask
from specforge.data_plane.offline import FeatureSet, Manifest
from specforge.data_plane.offline_writer import FeatureSetWriter
from specforge.prompts.recorded import recorded_lines

LENGTHS = (12, 9, 7, 12, 8, 11, 10, 7, 12, 9, 8, 7, 11, 12, 9, 10, 7, 8, 12, 11, 7, 10, 9, 12)
"""Two of them never fit into 12 tokens: a budget of 12 is a sample a micro-batch."""
SAMPLE_BUDGETS = {1: 12, 4: 48, 16: 192}
"""Tokens of a micro-batch that hold so many samples at least."""


def held_out_samples(world, lengths=LENGTHS):
    """Random samples; one has two answers, one has none."""
    samples = world.samples(lengths, seed=4)
    if len(samples) > 3:
        samples[1] = samples[1].masked((2, 5), (6, 9))
        samples[2] = samples[2].masked()
    return samples


def spans_of(mask):
    """Half-open ranges in which ``mask`` is set."""
    edges = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(mask.tolist())) if a != b), len(mask)]
    return tuple((start, end) for start, end in pairwise(edges) if mask[start])


def tasks_of(samples):
    return [
        PromptTask(sample.name, place, tuple(sample.ids.tolist()), spans_of(sample.mask))
        for place, sample in enumerate(samples)
    ]


def write_set(directory, world, samples, failed=()):
    """The feature set of ``samples``; those named in ``failed`` have none."""
    tasks = tasks_of(samples)
    manifest = Manifest(
        target_revision=world.target.revision,
        target_path="",
        target_dtype="float32",
        spec=world.spec,
        fingerprint=world.spec.fingerprint,
        hidden_size=world.target.hidden_size,
        prompts_sha256="",
        num_prompts=0,
    )
    writer = FeatureSetWriter(directory, manifest, recorded_lines(tasks), [task.sample_id for task in tasks])
    for task, sample in zip(tasks, samples, strict=True):
        if task.sample_id in failed:
            writer.fail(task.sample_id, "odd prompt")
        else:
            tensors = {"input_ids": sample.ids.int(), **sample.features}
            writer.add(task.sample_id, task.num_tokens, task.loss_spans, tensors)
    writer.finish()
    writer.close()
    return FeatureSet(directory)
