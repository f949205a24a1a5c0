"""Makes the clip that the demo sends: ``python -m bench.demo_clip scissor_vllm/demo/clip.mp4``.

It is a held-out clip of the synthetic world, on which the demo model was never trained. The command
also prints the questions about the clip, of which ``scissor_vllm/demo/client.py`` asks one.
"""

import argparse
from pathlib import Path

from bench.world.heldout import SEEDS, write_clip
from bench.world.questions import SKILLS, ask
from bench.world.scene import sample_scene

SKILL = "glyph"
SEED = SEEDS["heldout"][52]


def main() -> None:
    """Write the clip."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--skill", choices=SKILLS, default=SKILL, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="(default: %(default)s)")
    args = parser.parse_args()
    scene = sample_scene(args.seed, args.skill)
    write_clip(scene, args.path)
    print(f"{args.path}: {args.path.stat().st_size} bytes")
    for question in ask(scene, args.seed):
        print(f"{question.skill}: {question.text} ({question.answer})")


if __name__ == "__main__":
    main()
