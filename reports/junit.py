"""JUnit XML: one test case a site, for CI systems that list failing tests.

The form is the one that Jenkins, GitLab and GitHub actions read: a `testsuite` with counts, each
`testcase` with a `failure`, an `error` or a `skipped` where it did not pass.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

from divergence.pairs_result import Pairs
from divergence.reports import in_words, judged, number, plain, span, times
from divergence.reports.words import propagated
from divergence.result import Comparison, SiteResult, Unmatched


def render_junit(comparison: Comparison) -> str:
    """The comparison as JUnit XML.

    A site that fails is a failure, one that could not be judged an error, one that was excluded is
    skipped, and one that was not found in the candidate is a failure. A comparison that is an error
    as a whole without any such site has a case of its own that says why, so that it is never green.
    """
    return _document([_suite(comparison, "divergence")])


def render_pairs_junit(pairs: Pairs) -> str:
    """All pairs as JUnit XML, a suite for each."""
    return _document([_suite(pair.comparison, f"divergence: {pair.name}") for pair in pairs.pairs])


def _suite(comparison: Comparison, name: str) -> ET.Element:
    suite = ET.Element("testsuite", name=plain(name), time=_seconds(comparison))
    for site in comparison.sites:
        _site(suite, site, comparison)
    for item in comparison.unmatched:
        _unmatched(suite, item)
    counts = {kind: len(suite.findall(f"testcase/{kind}")) for kind in ("failure", "error", "skipped")}
    if comparison.verdict != "pass" and not counts["failure"] + counts["error"]:
        kind = "failure" if comparison.verdict == "fail" else "error"
        case = ET.SubElement(suite, "testcase", classname="divergence", name="verdict")
        _outcome(case, kind, comparison.verdict, comparison.reason, comparison.command)
        counts[kind] += 1
    suite.attrib |= {
        "tests": str(len(suite.findall("testcase"))),
        "failures": str(counts["failure"]),
        "errors": str(counts["error"]),
        "skipped": str(counts["skipped"]),
    }
    return suite


def _document(suites: list[ET.Element]) -> str:
    root = ET.Element("testsuites")
    root.extend(suites)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _seconds(comparison: Comparison) -> str:
    seconds = comparison.environment.get("seconds", 0)
    return f"{seconds:.3f}" if isinstance(seconds, int | float) else "0"


def _site(suite: ET.Element, site: SiteResult, comparison: Comparison) -> None:
    owner = site.site.rpartition(".")[0] or site.site
    case = ET.SubElement(
        suite, "testcase", classname=plain(f"divergence.{owner}"), name=plain(site.site), time="0"
    )
    if site.verdict == "pass":
        if propagated(site, comparison.policy):
            ET.SubElement(case, "system-out").text = plain(site.reason)
        return
    words = in_words(site, comparison.policy) if site.verdict == "fail" else site.reason or "not judged"
    by = judged(site, comparison.policy)
    ranges = (span(site.ref_min, site.ref_max), span(site.cand_min, site.cand_max))
    lines = [
        site.reason or words,
        f"error over floor: {times(by.ratio)} (limit {number(by.limit)}x)" if by.ratio is not None else "",
        "range: reference {}, candidate {}".format(*ranges),
    ]
    first = comparison.first_divergence
    for cause in comparison.causes:
        if site.site == (cause.site or (first.site if first else "")):
            lines += [f"cause: {cause.title}", *(f"  {line}" for line in cause.evidence), f"fix: {cause.fix}"]
    kind = "failure" if site.verdict == "fail" else "error"
    _outcome(case, kind, "divergence", f"{site.site}: {words}", "\n".join(map(plain, filter(None, lines))))


def _unmatched(suite: ET.Element, item: Unmatched) -> None:
    case = ET.SubElement(suite, "testcase", classname="divergence.unmatched", name=plain(item.site), time="0")
    said = f"{item.state}: {item.reason}" + (f"; {item.suggestion}" if item.suggestion else "")
    if item.state in ("missing in candidate", "shape mismatch"):
        _outcome(case, "failure", item.state, said, "")
    else:
        ET.SubElement(case, "skipped", message=plain(said))


def _outcome(case: ET.Element, kind: str, category: str, message: str, text: str) -> None:
    outcome = ET.SubElement(case, kind, type=plain(category), message=plain(message))
    outcome.text = text or None
