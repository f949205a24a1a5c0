"""A synthetic video world: scenes, questions with known answers, frames and clips."""
