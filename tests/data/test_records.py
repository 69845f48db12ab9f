from whet.records import Evidence, Latency

METRIC = {"name": "accuracy", "value": 0.95, "ci95": [0.924, 0.967], "n": 400, "higher_is_better": True}
RUNTIME = {"name": "litert", "version": "2.3.0"}


def test_evidence_prints_as_a_line_and_its_warnings():
    timed = Latency(0.00114, 0.00121, batch=8, threads=2, runs=400, cpu_per_wall=1.0)
    file = Evidence("m.tflite", 22384, 8395, METRIC, timed, RUNTIME, None, {}, warnings=("SLOWER here",))
    assert str(file).split("\n") == [
        "m.tflite: accuracy 95.0 % [92.4, 96.7] (n=400); 22.4 kB, 8.39 kB gzipped; 0.00114 ms (batch 8, 2 threads); litert 2.3.0",
        "! SLOWER here",
    ]


def test_evidence_of_a_model_in_its_framework_has_no_file_to_speak_of():
    assert str(Evidence("", 0, 0, METRIC, None, {"name": "torch"}, None, {})) == "accuracy 95.0 % [92.4, 96.7] (n=400); torch"
