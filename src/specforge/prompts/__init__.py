"""Datasets to PromptTask.

* ``sources``     JSONL lines to conversations and texts
* ``chat``        conversations to tokens and loss spans, by the tokenizer's chat template
* ``tasks``       a data section to the sequence of ``PromptTask``
* ``questions``   benchmark questions and samples up to their answer, to prompts that are decoded
* ``vocabulary``  counts of tokens under the loss
"""
