"""Studies: grids of runs that differ in what is studied and in nothing else."""

from mmjax.study.grid import Arm, Study, StudyError, load_study, plan
from mmjax.study.report import write_report
from mmjax.study.results import Answers, Results, choose_rates, read_rows, summarise, write_tables
from mmjax.study.runner import Local, run_study, slurm
from mmjax.study.runs import Run

__all__ = [
    "Answers",
    "Arm",
    "Local",
    "Results",
    "Run",
    "Study",
    "StudyError",
    "choose_rates",
    "load_study",
    "plan",
    "read_rows",
    "run_study",
    "slurm",
    "summarise",
    "write_report",
    "write_tables",
]
