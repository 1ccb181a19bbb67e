"""Several ranks as one: a group, a header through its store before anything else, who owns what, one packed reduce."""
