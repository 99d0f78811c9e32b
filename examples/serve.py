"""Serve with switching: texts of one client, continued one after the other, at the precision that each needs.

    python examples/serve.py --model quantized --prompt "First text .." --prompt "The next .."

`dynamo-jax generate --adapt` does the same; here it is a loop of your own.
"""

from __future__ import annotations

import argparse

import dynamo_jax as dj


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a folder that quantize wrote")
    parser.add_argument("--prompt", action="append", required=True)
    parser.add_argument("--max-tokens", type=int, default=64)
    given = parser.parse_args()

    model = dj.load_text_model(given.model, adapt=True)
    settings = dj.GenerateConfig(max_tokens=given.max_tokens)
    seen = 0
    for prompt in given.prompt:
        print(f"> {prompt[:60]}")
        for (piece,) in dj.stream(model, [prompt], settings):
            print(piece, end="", flush=True)
        print()
        for event in model.follower.events[seen:]:  # after 256 tokens of all texts there is something to say
            print(f"  [{event.what} {event.name}, score {event.score:.2f}, token {event.token} of text {event.text}]")
        seen = len(model.follower.events)
    print(f"variant in use: {int(model.follower.state.number[0])} (0 is the baseline)")


if __name__ == "__main__":
    main()
