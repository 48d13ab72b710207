"""A page to try a run's models in a browser, or its folder for a Space.

    python recipes/demo.py runs/quickstart
    python recipes/demo.py runs/quickstart --space my_space && hf upload NAME/SPACE my_space . --repo-type space

Needs gradio: pip install -c constraints.txt -e ".[demo]".
"""

import argparse
from pathlib import Path


def main() -> None:
    description, _, _ = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("run", type=Path, help="the run's folder, its output_dir")
    parser.add_argument("--space", type=Path, help="write the folder of a Space in place of serving the page")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: other machines reach the page (%(default)s)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="a public link for a week, through gradio's servers")
    args = parser.parse_args()

    from onerec_hf.demo.page import launch_page, optional_gradio
    from onerec_hf.demo.run_content import content_of_run
    from onerec_hf.demo.space import write_space

    if args.space is None:
        optional_gradio()  # rather than after the models are loaded
    content, title = content_of_run(args.run), f"OneRec, {args.run.resolve().name}"
    if args.space is not None:
        write_space(content, args.space, title)
        print(f"Written: {args.space}. Push it: hf upload NAME/SPACE {args.space} . --repo-type space")
    else:
        launch_page(content, title, server_name=args.host, server_port=args.port, share=args.share)


if __name__ == "__main__":
    main()
