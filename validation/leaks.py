"""Does a thought give away that its writer was told the answer? (METHOD 6)

    leak_of("The user actually bought @C, so it comes first.")      # -> "outcome_stated"

A teacher that sees the target may reason from it instead of towards it; a student that copies such words learns to claim what it
cannot know. A form is a way of giving it away: a set of patterns over lower-cased text. What a thought may say is left alone: preferences
("likes", "would choose next"), comparisons ("the best choice"), history in the past tense ("bought two shampoos").
"""

import hashlib
import json
import re

_LABEL = r"(?:@?[a-t]|it|(?:this|that) (?:one|item|candidate)|(?:candidate|item|label) @?[a-t])\b"
_ITEM = r"(?:item|choice|candidate|answer|label|product|option|one|pick)"
_DONE = r"(?:bought|purchased|chose|chosen|clicked(?: on)?|picked|selected|ordered|took|taken)"
_TAKE = r"(?:buy|buying|purchase|choose|choosing|click|clicking|pick|picking|select|selecting|order|take|got|get|" + _DONE + ")"
_SURE = r"(?:actually|indeed|really|in fact|did|eventually|ultimately|subsequently|later|finally|went on to|ended up|in the end|then)"
_AFTER = r"(?:next|afterwards?|in the end|after (?:this|that|the history)|eventually|later|the (?:following|next) day)"
_WHO = r"(?:user|customer|shopper|person|they|she|he|buyer)"
_SHOWS = r"(?:shows?|showed|confirms?|confirmed|reveals?|revealed|proves?|proved)"
_LOGS = r"(?:logs?|records?|data|history|activity|sessions?|behaviou?r)"
_HIDDEN = r"(?:hidden|held[- ]?out|withheld|masked|secret|concealed|unseen|undisclosed|left[- ]out)"
_GUESS = r"(?<!likely )(?<!probable )(?<!plausible )"
_MUST = r"(?:asked|told|required|instructed|supposed|needed|expected|meant|have|has|need)"
_FIRST = r"(?:first|at the top|on top|number one|in first place)"

FORMS: dict[str, tuple[str, ...]] = {
    # "the target is C"
    "target_named": (
        r"\btargets?\b(?! (?:audience|group|market|price|skin|area|problem))",
        r"\bgold(?:en)? (?:label|answer|item|standard)\b",
    ),
    # "the ground truth", "the true next item", "a positive example"
    "ground_truth": (
        r"\bground[- ]?truth\b",
        r"\b(?:true|real|actual) (?:next )?" + _ITEM + r"\b",
        r"\b(?:true|actual) (?:outcome|ranking|order)\b",
        r"\bpositive (?:example|sample|item|label)\b",
    ),
    # "the correct choice", "the answer is C"
    "correct_answer": (
        r"\bcorrect (?:next )?(?:" + _ITEM + r"|ranking|order|response|solution|recommendation)\b",
        r"\b(?:answer|solution) (?:is|was|must be|should be|has to be|would be)\b",
        r"\bright answer\b",
        r"\b(?:is|was|being) (?:the )?correct\b",
    ),
    # "as given", "I was told", "according to the hint"
    "told": (
        r"\b(?:as|was|were|is|been|being|am|are) (?:already )?(?:given|told|informed|provided|revealed|disclosed|instructed)\b",
        r"\bas (?:stated|indicated|mentioned|specified|noted) (?:above|(?:in|by) the (?:prompt|hint|task|instruction\w*))",
        r"\b(?:the|a|this|your|that) (?:hint|clue|spoiler)s?\b",
        r"\b(?:you|instructions?|prompt|system) (?:told|tells?|said|says?|state[sd]?|reveal(?:s|ed)?|informed|gave|disclose[sd]?)\b",
        r"\b(?:without|not|never|avoid) (?:saying|mentioning|revealing|disclosing|admitting|letting on)\b",
        r"\bfor (?:me|you) alone\b",
    ),
    # "the user actually bought C", "it was then purchased"
    "outcome_stated": (
        r"\b" + _SURE + r" (?:\w+ )?" + _TAKE + r"\b",
        r"\b" + _DONE + " " + _LABEL + " " + _AFTER + r"\b",
        r"\b(?:was|were|has been|had been|got) (?:in fact |then |later |actually |indeed )?"
        + _DONE
        + r"(?: next| by | in the end| after|[.,;:!]|$)",
        r"\b" + _WHO + r" (?:has |had |have )?" + _DONE + " " + _LABEL,
    ),
    # "the hidden next item", "the test label"
    "held_out": (
        r"\b" + _HIDDEN + r" (?:next |test )?(?:" + _ITEM + r"|purchase|click|interaction|event|truth|outcome)\b",
        r"\b(?:test|evaluation|validation) (?:label|set|item|answer|split|example)\b",
        r"\b(?:data ?set|benchmark|training (?:label|example|data|set))\b",
    ),
    # "the next purchase was C", "what came next"
    "next_event": (
        _GUESS
        + r"\b(?:next|following|subsequent|future|upcoming) (?:purchase|interaction|click|event|order|transaction|"
        + _ITEM
        + r") (?:is|was|were|turned out|turns out|happens|happened|proved)\b",
        r"\b(?:what|which) (?:actually )?(?:came|comes|happened|happens|followed|follows) (?:next|after|later|then)\b",
        r"\bturn(?:s|ed) out (?:to be|that)\b",
        r"\b(?:next|following|subsequent) (?:record|entry|row|log|line) (?:is|was|says|has|reads|lists|" + _SHOWS + r")\b",
    ),
    # "in hindsight", "later logs show"
    "future_seen": (
        r"\bhindsight\b",
        r"\b(?:from|in|of|into|about|know\w*) the future\b",
        r"\bfuture (?:knowledge|actions?|" + _LOGS + r")\b",
        r"\b(?:later|subsequent) " + _LOGS + " " + _SHOWS + r"\b",
        r"\blook(?:ing|ed)? ahead\b",
        r"\b(?:after the fact|retrospect\w*|after (?:this|the) request)\b",
        r"\b(?:confirmed|proven|proved|verified|validated|borne out) (?:by|later|afterwards|in)\b",
    ),
    # "we know that C is wanted", "given the outcome", "the eventual purchase"
    "known": (
        r"\b(?:we|i|you) (?:already |do |now )?(?:know|knew) (?:(?:that|for|which|what|the|how)\b|" + _LABEL + ")",
        r"\b(?:it is|it's|is|are|being|was) (?:already )?(?:known|certain|guaranteed|confirmed|established)\b",
        r"\b(?:knowing|given|because|since) (?:(?:that|the|this|our|their|known) )*(?:answer|outcome|result|truth)\b",
        r"\b(?:known|eventual|final|ultimate) (?:" + _ITEM + r"|purchase|outcome|decision|result)\b",
    ),
    # "asked to place C first", "to justify the choice"
    "justified": (
        r"\b" + _MUST + r" to (?:be )?(?:put|placed?|ranked?|justify|explain why|argue|support|defend|first)\b",
        r"\b(?:justify|rationali[sz]e|back up|explain) (?:why )?(?:putting|placing|ranking|(?:the|this) "
        r"(?:choice|answer|selection|pick|outcome|result|order|label))\b",
        r"\b(?:must|has to|have to|needs to) (?:therefore |thus |then )?(?:be|come|stand|go|rank) (?:(?:ranked|placed|put) )?"
        + _FIRST
        + r"\b",
        r"\bwork(?:ing)? backwards?\b|\breverse[- ]engineer\w*\b|\bpost[- ]hoc\b",
    ),
}
_COMPILED = {form: re.compile("|".join(patterns)) for form, patterns in FORMS.items()}
DIGEST = hashlib.sha256(json.dumps(FORMS).encode()).hexdigest()[:8]  # of the patterns: verdicts by others are others
_DROPPED = str.maketrans({"\u2019": "'", "*": "", "_": " ", '"': "", "`": ""})


def leak_of(thought: str) -> str:
    """The first form of leak in a thought, or "". Labels are written @C or bare; case, spacing and emphasis do not matter."""
    text = " ".join(thought.lower().translate(_DROPPED).split())
    return next((form for form, pattern in _COMPILED.items() if pattern.search(text)), "")
