"""Settings of the command prompts."""

from dataclasses import dataclass

from datasetdm_fast.runs.prompting.balance import MOST_PROMPTS
from datasetdm_fast.runs.prompting.grammar import SETS
from datasetdm_fast.settings import dry_run_setting, setting


@dataclass(frozen=True)
class PromptsConfig:
    set: str = setting("demo", "set of classes that the prompts are for", choices=SETS)
    classes: tuple[str, ...] = setting((), "only these classes of the set, or words of your own", metavar="LIST")
    class_table: str = setting(
        "", "classes of your own: a CSV file (name,say,words) or LVIS's annotation file", metavar="FILE"
    )
    per_class: int = setting(
        0, "prompts for each class; 0 = 100, or as other flags say", metavar="N", least=0, most=MOST_PROMPTS
    )
    target_counts: str = setting(
        "", 'JSON file with the number of prompts for each class: {"cat": 40, ...}', metavar="FILE"
    )
    balance: str = setting(
        "", "labelled images, such as coco:PATH; their rarer classes get more prompts", metavar="DATA"
    )
    pairs: float = setting(0.0, "share of the prompts that name two classes, 0 to 1", metavar="SHARE", least=0, most=1)
    seed: int = setting(0, "seed of the sentences", metavar="N")
    out: str = setting(
        "prompts.jsonl", "file to write, JSON lines, for generate --prompts", metavar="FILE", output="file"
    )
    llm_url: str = setting("", "ask the language model of an OpenAI-compatible endpoint", metavar="URL")
    llm_model: str = setting("", "name of the model at that endpoint", metavar="NAME")
    llm_requests: int = setting(
        1000, "maximum number of requests to the language model", metavar="N", least=0, most=10**6
    )
    dry_run: bool = dry_run_setting()
    json: bool = setting(False, "statistics of the list as one JSON object on stdout")
    quiet: bool = setting(False, "show no progress")
