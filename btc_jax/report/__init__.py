"""A report of what quantization saved and cost: one page of HTML that needs nothing else."""

from btc_jax.report.build import btc_report as btc_report
from btc_jax.report.build import report_files as report_files
from btc_jax.report.records import BaselineFigures as BaselineFigures
from btc_jax.report.records import LeafDetails as LeafDetails
from btc_jax.report.report import Report as Report
