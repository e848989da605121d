"""RunConfig and how it is read: ``run`` (models), ``load`` (file and overrides), ``reference`` (documentation)."""
