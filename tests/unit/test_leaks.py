"""Planted leaks in ten forms of twenty, and thoughts that give nothing away (METHOD 6: at least 95 % found, at most 2 % false alarms)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr2.prompts import load_template
from validation.leaks import FORMS, leak_of

pytestmark = pytest.mark.unit

PLANTED = {
    "target_named": """
The target is @C, so it goes first.|Because @B is the target item I rank it on top.|Target: @D. The rest follow by popularity.
@A matches the target best.|We want the TARGET at rank one.|Since the target shares the brand, it wins.
the targets' brand is the same as the last item|Clearly label A is our target here.|I put the gold answer first.
The gold label points at @E.|The golden item is @F.|@G, the target, has nextBest.|Rank the target candidate above the others.
The target product fits the need.|Everything else is weaker than the target.|With the target in mind, @B leads.
A target like @C needs a reason.|@H is marked as target.|Our target has pairTop.|Move the target up, then sort by prior.""",
    "ground_truth": """
The ground truth is @C.|Ground-truth says @A comes next.|According to the groundtruth, @B.|@D is the true next item.
The real answer is @E.|The actual item is @B so it comes first.|The true ranking starts with @A.|The actual outcome favours @C.
@F is the positive example in this list.|The positive sample is @G.|The positive item stands at slot three.
It is the actual next choice.|The true label is H.|the real pick here is @A|To match the ground truth, @D must lead.
The actual order puts @B first.|The true choice has likeHigh.|True answer: @C.|The real next product is @E.
Compared with the ground truth the prior is wrong.""",
    "correct_answer": """
The correct answer is @C.|@B is the correct choice.|The answer is A.|The answer must be @D because of the brand.
So the answer should be @E.|The correct item has nextBest.|The right answer stands third.|Correct label: @F.
The correct ranking is @A, @B, @C.|The solution is @G.|That makes @H correct, and it is correct because of the pair.
Candidate @A is the correct one.|The correct next item would be @B.|I verify that the answer was @C.|The correct recommendation is @D.
Only one answer is right; the right answer is E.|The correct order starts with @B.|It follows that the answer has to be @A.
The correct candidate shares the brand.|@C was correct.""",
    "told": """
As given, @C comes first.|I was told that @B is chosen.|We are informed that @A wins.|As stated in the prompt, the choice is @D.
According to the hint, @E leads.|The hint says @F.|The prompt says that @G was picked.|You told me that @H is it.
The instructions reveal the choice.|As indicated above by the task, @A.|Without saying that I was told, I explain @B.
For me alone it is clear: @C.|It was revealed that @D is next.|I have been given the outcome.
I should explain it without mentioning the note.|As was disclosed, @E.|The clue makes it easy.
Per the prompt, as specified in the instructions, @F first.|The system told us which one.
I should not reveal why I put @G first, never mentioning the note.""",
    "outcome_stated": """
The user actually bought @C.|The user did choose @B.|They ended up buying @D.|In the end they picked @A.
The customer went on to purchase @E.|The user bought @F next.|She finally chose @G.|@H was then purchased.|It was chosen by the user.
@A was eventually clicked.|The shopper really took @B.|The user later bought it.|He subsequently ordered @C.
@D has been purchased by this user.|The person indeed clicked on @E.|The user then selected @F.|The buyer picked @G.
They chose this one after that.|The user ultimately took @A.|The user chose @B over the others.""",
    "held_out": """
The hidden item is @C.|The held-out item shares the brand.|Our heldout choice is @B.|The masked item has nextBest.
The withheld purchase is @D.|The secret answer is @E.|The hidden next item is @A.|The test label is F.
The evaluation label points at @G.|This is the test item.|The left-out interaction is @H.|The concealed item fits the need.
In the dataset @A follows.|The training label is @B.|The data set lists @C.|The benchmark wants @D.|The unseen choice is @E.
The masked product is @F.|The validation item is @G.|the hidden click was on @B""",
    "next_event": """
The next purchase was @C.|The next interaction is @B.|What came next was @D.|The following item was @A.|It turned out to be @E.
The next record shows @F.|The subsequent purchase was @G.|The next event is a click on @H.|The following entry is @A.
What happened next confirms @B.|The next row lists @C.|The future purchase was @D.|It turns out that @E wins.
The upcoming order is @F.|What follows next is @G.|The next transaction was @H.|The next click was on @A.|The next log line says @B.
The following record confirms @C.|The next choice happened to be a brush; the next choice was @D.""",
    "future_seen": """
In hindsight @C is clear.|With hindsight, @B.|The later logs show @D.|Knowing the future, @A comes first.|Future data point at @E.
Looking ahead, they take @F.|Subsequent history confirms @G.|Later sessions reveal @H.|As confirmed by the log, @A leads.
After the fact, @B is obvious.|In retrospect, @C.|After this request @D appears.|This is confirmed later.
Future behaviour includes @E.|From the future record we see @F.|The later data proved it.|Retrospectively, @G fits.
The choice is validated by what they do.|It is borne out by the log.|If we look ahead in the log, @H.""",
    "known": """
We know that @C is wanted.|I know the answer.|It is known that @B is next.|Given the outcome, @D leads.
Since the result is @A, it goes first.|The final purchase is @E.|The eventual choice is @F.|The known answer is @G.
Because we know what they take, @H.|We already know @A.|Knowing the outcome, I start with @B.|It's certain: @C comes.
The ultimate choice has nextBest.|As it is already established, @D.|Given that the outcome favours it, @E.|You know which one.
We now know for sure.|The known item is @F.|The final decision was @G.|The user's choice is confirmed.""",
    "justified": """
I was asked to rank @C first.|I have to put @B first.|I need to justify @D.|To justify the choice, note the brand.
@A must be ranked first.|@E has to come first.|I am required to place @F on top.|To explain why ranking @G first makes sense.
Working backwards from @H, the need is clear.|I must support @A; I am expected to argue for it.|We are supposed to put @B at the top.
Reverse-engineering the need from @C.|This is a post-hoc reason for @D.|I work backwards to a need.
To rationalise this choice, use the pair.|The instruction is to explain why it leads: I need to explain why.
@F must therefore stand first.|It needs to be placed first.|I am meant to defend @G.|I should back up the selection with evidence.""",
}
FINE = """
pattern brandTwo kindSame. need nextBest likeHigh. compare @C nextBest likeHigh, @A priorOne, @B popTop.
The history shows hair care of one brand; the user would next want a conditioner. @C is pairBest and shares the brand, @A is only popular.
The user bought two shampoos and a brush, a month apart. A conditioner is the likely need. @B is nextTop; @D has no evidence.
They liked @-free, light products; kindSame points at @E. Compare @E likeTop with @A priorOne: @E first.
Pattern: skin care, mostly one brand. Need: something to follow a cleanser. Comparison: @F nextBest, @G pairHigh, then the prior.
This user chooses by brand: brandMore. @H and @A carry it; @A is also popTop.
The last item was a nail polish; a remover is often bought right after it. @B nextBest.
Because the gap is low, the prior says little; the pair evidence decides: @C pairTop, @D pairMid.
No candidate has direct transitions, so similarity and popularity decide: @A likeBest, @E popBest.
@B would be the best choice given the last item, then @C, then the popular ones.
The user is likely to choose @D next, since it completes the set.
Weak evidence everywhere; keep to everBest and liftBest: @G, then @H.
The history is old (dayYear), so recent popularity counts more: @F popTop.
Need: a serum after a toner. @A fits the need best; @B and @C are close in kind.
The most likely next item is @C, by transition and brand.
History says the user clicked on budget items; @E is cheap and similar.
@D is shown last but has the strongest evidence, so it goes first.
Two items of the same brand and a brush: the user may order a comb next. @B kindClose.
The user selected hair products three times; @A and @F are hair products.
I prefer @G over @A: nextMid against nextLow.
Each candidate fits a little; @H fits most because it is pairBest.
The user tends to pick popular items; trendTop on @C.
Target audience of @B is teens, which does not fit the adult brand in the history.
The order of the history suggests a routine: cleanse, tone, moisturise. @E moisturises.
@A is a good option; @B a better one by lift.
In the last week the user bought items of two kinds; @C belongs to both.
Then @D, which is also close; finally @E, with no evidence.
A user who took a liking to this brand will probably want @F.
Items with nextHigh usually lead; here @G has it.
Prior order is a useful tie-break: @A before @B.
What the user needs next is a refill; @H is one.
Given the brand and the last item, @C stands out.
The evidence given on its line is nextBest and brandOne.
Given these words, rank @A, @D, @C.
@B was popular lately (popTop), yet nothing ties it to the history.
The user has purchased polish often; @E is a polish.
It is likely that @F completes the routine.
From the history we see a move from make-up to skin care, so @G.
The right order depends on how much weight pairs get; here they agree with likeness.
Kind and brand agree on @A, and it is also priorTwo.
The user often orders refills after a month; @D is a refill.
After that, candidates of the same kind: @B, @C.
@H looks like the best answer to the need for sun care.
The user may come back for @E, which is everTop.
Nothing in the history speaks for @F; it goes last.
First the pattern: dayWeek items of one brand. Then the need: more of it.
pattern kindClose trendHigh. need everBest liftTop. compare @B everBest liftTop, @J priorTwo, @F trendHigh.
pattern. need pairLow. compare @D pairLow, @A priorOne, @C.
The strongest pair is with line 2; @G is chosen soon after it.
I would put @C first, @A second.""".strip().splitlines()


def planted(form: str) -> list[str]:
    """The twenty leaks of a form."""
    return [text.strip() for text in PLANTED[form].replace("\n", "|").split("|") if text.strip()]


def test_there_are_ten_forms_of_twenty() -> None:
    assert set(PLANTED) == set(FORMS)
    assert {form: len(planted(form)) for form in PLANTED} == dict.fromkeys(FORMS, 20)


def test_at_least_95_percent_are_found_in_all_and_90_in_each_form() -> None:
    missed = {form: [t for t in planted(form) if not leak_of(t)] for form in PLANTED}
    assert sum(map(len, missed.values())) <= 10, missed
    assert all(len(texts) <= 2 for texts in missed.values()), missed


def test_at_most_2_percent_false_alarms() -> None:
    alarms = {t: leak_of(t) for t in FINE if leak_of(t)}
    assert len(FINE) >= 50
    assert len(alarms) <= 0.02 * len(FINE), alarms


@pytest.mark.parametrize("form", PLANTED)
def test_a_leak_is_found_inside_an_honest_thought_and_however_it_is_written(form: str) -> None:
    texts = [t for t in planted(form) if leak_of(t)]
    for text, honest in zip(texts, FINE, strict=False):
        assert leak_of(f"{honest} {text}")
        assert leak_of(text.upper().replace(" ", "  \n"))
        assert leak_of(f"**{text}**")


@given(
    st.lists(st.sampled_from([*sorted(load_template().vocabulary), "@A", "@C", "@T", "pattern", "need", "compare", ",", "."]), max_size=30)
)
def test_evidence_words_alone_never_leak(words: list[str]) -> None:
    assert leak_of(" ".join(words)) == ""
