"""The command line: ``main`` and one module a verb. Argument parsing and printing only; imports no tensor library."""
