"""A made-up video world: scenes, questions whose answers are known, pictures and clips of them."""
