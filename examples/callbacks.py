"""Use callbacks from a thread, in a program without asyncio."""

import threading

from penstock import Delta, InferenceEngine, RequestOutput, SamplingParams

PARAMS = SamplingParams(temperature=0.6, max_tokens=32, seed=1)
PROMPTS = ("def read_lines(path):\n", "def is_empty(self):\n", "import os\n")


def log(text: str) -> None:
    print(f"[{threading.current_thread().name}] {text}\n", end="")  # in one piece, beside other threads


def submit_all(engine: InferenceEngine) -> None:
    """Submit requests with a callback that gets the result of each, however it ends."""

    def on_end(output: RequestOutput) -> None:
        log(f"{output.request_id} ended with {len(output.generated_ids)} tokens after {output.prompt!r}")

    for prompt in PROMPTS:
        log(f"submitted {engine.submit_request(prompt, PARAMS, callback=on_end)}")


def main() -> None:
    engine = InferenceEngine()
    engine.start()
    pieces: list[Delta] = []
    worker = threading.Thread(target=submit_all, args=(engine,), name="worker")
    worker.start()
    engine.generate("class Queue:\n", PARAMS, callback=pieces.append)  # one callback per piece of text
    worker.join()
    engine.stop()  # finishes accepted requests and waits for the callbacks
    log(f"{len(pieces)} pieces: {''.join(piece.text for piece in pieces)!r}")


if __name__ == "__main__":
    main()
