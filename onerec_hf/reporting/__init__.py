"""Shows what was measured: the run's report, tables for a terminal, comparisons of policies and model cards.

`metrics_schema` says what every figure of metrics.json means.
"""

from .model_cards import onerec_card, push_run_to_hub, push_to_hub, reward_model_card, save_model_card, tokenizer_card
from .policy_comparison import comparison_figure, comparison_table
from .report import print_table, write_report
from .results_table import results_table
from .run_summary import run_summary
from .tables import Measured, Table, number
