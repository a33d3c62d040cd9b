#!/usr/bin/env bash
# The check as a shell script, for any CI system. Run it where divergence.toml is, and keep the folder
# report as an artifact: report.html is the page, junit.xml what most systems read.
#   ci.sh [REF [CAND [OUT]]]
# Exit status: 0 pass, 1 fail, 2 not answered.
set -u
ref=${1:-pytorch} cand=${2:-onnx} out=${3:-report}

# A report of an earlier run must not be taken for this one's.
rm -f "$out/report.json" "$out/summary.md"
status=0
divergence compare --ref "$ref" --cand "$cand" --out "$out" || status=$?
if [ -f "$out/summary.md" ]; then
  cat "$out/summary.md"
else
  echo "divergence: nothing was compared; the message above says why" >&2
fi
exit "$status"
