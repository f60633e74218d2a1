"""What all metrics here share: an `evaluate.MetricInfo` of three facts."""

import evaluate
from datasets import Features, List, Value

TEXT, NUMBER, FRACTION = Value("string"), Value("int64"), Value("float64")
TEXTS, NUMBERS = List(TEXT), List(NUMBER)


def metric_info(description: str, citation: str, predictions, *references) -> evaluate.MetricInfo:
    """The info of a metric on such predictions and references, features of `datasets`; several are ways to give them."""
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        features=[Features({"predictions": predictions, "references": reference}) for reference in references],
    )
