"""Golden vectors: results of public projects, reproduced from the product's own parts.

``python -m specforge.testing.golden DIR [--strict]`` runs every vector below DIR and exits 1 if one is over its
tolerance or could not be run; one whose inputs are in a file that is not there is named, and has nothing to compare. A
vector is a ``.json`` file, most with tensors in a ``.safetensors`` twin; the folder names the family, ``project`` in
the json the conventions, the other keys the options. File names mean nothing.

* ``vectors``   finding and reading vectors
* ``report``    comparisons, tolerances, the table
* ``eagle3``, ``peagle``, ``dflash``, ``domino``, ``dspark`` (with ``blocks``)   the projects' conventions of training
* ``traces``, ``eagle_tree``, ``verify``    decoding: greedy traces, trees, verification probabilities
* ``schedule``  learning rates and optimizer steps
* ``tables``    layer ids and vocabulary maps
* ``run``       which vector is run by what
"""
