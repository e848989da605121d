"""Pieces that several draft algorithms share. Algorithms never import each other; what two of them need lives here.

* ``rotary``       rotary position embedding: plain, linear, llama3, yarn
* ``norm``         RMSNorm
* ``mlp``          SwiGLU
* ``attention``    exact attention of unrolled drafts over packed documents, at the cost of the documents
* ``vocabulary``   pruned draft vocabularies: kept ids, ``d2t``, ``t2d``
* ``tables``       the frozen tables of a target, read from its directory
* ``losses``       soft cross entropy from a teacher's hidden states, chunked
"""
