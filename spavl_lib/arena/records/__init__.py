"""Records: the fastest ways from the base model to one that is safe and helpful."""
