"""Pieces that several draft algorithms share. Algorithms never import each other; what two of them need lives here.

* ``rotary``       rotary position embedding: plain, linear, llama3, yarn
* ``norm``         RMSNorm
* ``mlp``          SwiGLU
* ``attention``    exact attention of unrolled drafts over packed documents, at the cost of the documents
* ``architectures``  draft architectures by name (``register_draft``): llama, qwen3, mla; torch-free
* ``projections``  the attention of an architecture up to its pattern: projections, norms, rotation
* ``mla``          multi-head latent attention, and its served order of rotated rows
* ``vocabulary``   pruned draft vocabularies: kept ids, ``d2t``, ``t2d``
* ``tables``       the frozen tables of a target, read from its directory
* ``losses``       soft cross entropy from a teacher's hidden states, chunked
* ``sequence``     sequence parallelism: the rows of a sample over several ranks
* ``alignment``    which rows of a packed batch are supervised, and which tokens they see
* ``row_cache``    keys and values of one sequence, for proposers
* ``target_layers`` decoder layers of a target, read from its directory
"""
