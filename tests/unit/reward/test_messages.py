from services.reward.messages import from_score, to_score
from services.reward.scorer import Part, Score, Status
from services.reward.spec import GraderSpec


def test_graders_of_one_name_keep_a_score_each() -> None:
    graders = (GraderSpec(name="math"), GraderSpec(name="math", weight=0.5))
    parts = tuple(
        Part(grader="math", reward=reward, weight=spec.weight, extracted=None, reason="")
        for spec, reward in zip(graders, (1.0, 0.0), strict=True)
    )
    score = Score(reward=1.0, extracted=None, reason="", seconds=0.0, status=Status.OK, parts=parts)
    arrived = from_score(to_score(score, graders), graders)
    assert {part.grader: part.reward for part in arrived.parts} == {"math": 1.0, "math#2": 0.0}
