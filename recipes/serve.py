"""Recommendations over HTTP: a model's server, with batching, limits, metrics and reload.

    python recipes/serve.py runs/quickstart/align/model
    curl -d '{"inputs": [[100012, 100007]]}' http://127.0.0.1:8000/recommend

SIGHUP reloads the model, SIGTERM stops when all requests are answered. Needs starlette, uvicorn and prometheus_client:
pip install -c constraints.txt -e ".[serve]".
"""

import argparse
import logging
import sys


def make_parser() -> argparse.ArgumentParser:
    description, _, _ = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", help="the generator's folder, or Hub id")
    parser.add_argument("--reward_model", help="folder or Hub id: chooses sessions, and guides the search if asked to")
    parser.add_argument("--revision", help="of the generator's repository: a branch, tag or commit")
    parser.add_argument("--reward_model_revision", help="of the reward model's repository")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: other machines reach the server")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one, which is printed")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with a model of its own")
    parser.add_argument("--threads", type=int, help="of each worker; by default torch's own number")
    parser.add_argument("--max_batch", type=int, default=32, help="histories at most that are searched for together")
    parser.add_argument("--wait_ms", type=float, default=20.0, help="that a free worker waits for as many as before")
    parser.add_argument("--max_queue", type=int, default=256, help="requests at most that wait; others get 503")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds at most to an answer; then 503")
    parser.add_argument("--max_body", type=int, default=2**20, help="bytes of a request at most; others get 413")
    parser.add_argument(
        "--max_history", type=int, default=1000, help="items of a history, or of another list, at most"
    )
    parser.add_argument("--max_beams", type=int, default=256, help="num_beams and top_k at most")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    for name in ("workers", "max_batch", "max_queue", "timeout", "max_body", "max_history", "max_beams"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} must be above 0, got {getattr(args, name)}.")

    from onerec_hf.serving import Limits, LoadError, ServerOptions, serve

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    limits = Limits(args.max_body, args.max_batch, args.max_history, args.max_beams, args.timeout, args.max_queue)
    revisions = {"model": {"revision": args.revision}, "reward_model": {"revision": args.reward_model_revision}}
    options = ServerOptions(
        args.model, args.reward_model, revisions, args.workers, args.threads, args.wait_ms / 1000, limits
    )
    try:
        serve(options, args.host, args.port)
    except (LoadError, OSError) as error:
        sys.exit(f"onerec serve: {error}")


if __name__ == "__main__":
    main()
