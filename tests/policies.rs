//! Parsing of policies: every stage, every bound, every mistake.

mod common;

use std::sync::LazyLock;

use common::weights::{self, Shape, with_file};
use kvmgr::error::Kind;
use kvmgr::policy::{Event, Pipeline, PositionMode, STAGES, StageClass};
use kvmgr::registry::Domain;
use kvmgr::shape::{LaneWidth, Needs};

/// Weights for every stage that reads a file.
static WEIGHTS: LazyLock<tempfile::NamedTempFile> =
    LazyLock::new(|| weights::write(Shape { layers: 1, heads: 2, group: 2, dim: 8, hidden: 6 }));

const BOTH: [Event; 2] = [Event::PrefillEnd, Event::Step];

fn error_of(spec: &str) -> String {
    let error = Pipeline::parse(spec).expect_err(spec);
    assert_eq!(error.kind(), Kind::InvalidArgument, "{spec}: {error}");
    error.message().to_string()
}

/// The pipeline of a stage with these arguments, and the column at which the stage starts.
fn with_stage(class: StageClass, stage: &str) -> (String, usize) {
    let (before, after) = match class {
        StageClass::Trigger => ("", " | h2o | keep(0.5)"),
        StageClass::Score => ("", " | keep(0.5)"),
        StageClass::Map | StageClass::Budget => ("h2o | ", " | keep(0.5)"),
        StageClass::Keep => ("h2o | ", ""),
        StageClass::Act => ("h2o | keep(0.5) | ", ""),
        StageClass::Position | StageClass::Quant | StageClass::Select => ("", ""),
    };
    (format!("{before}{stage}{after}"), before.len() + 1)
}

#[test]
fn every_stage_is_documented_and_its_examples_parse() {
    assert!(STAGES.is_sorted_by_key(|stage| stage.class));
    for (i, stage) in STAGES.iter().enumerate() {
        assert!(STAGES[..i].iter().all(|other| other.name != stage.name), "{}", stage.name);
        assert!(!stage.summary.is_empty() && !stage.examples.is_empty(), "{}", stage.name);
        assert!(stage.class != StageClass::Score || stage.name == "full" || stage.paper.len() > 5);
        for param in stage.params {
            assert!(!param.name.is_empty() && !param.help.is_empty(), "{}", stage.name);
        }
        let mut needs = Needs::NONE;
        for example in stage.examples {
            assert!(example.contains(stage.name), "{example}");
            let example = with_file(example, WEIGHTS.path());
            let pipeline = Pipeline::parse(&example).unwrap_or_else(|e| panic!("{example}: {e}"));
            assert_eq!(pipeline.spec(), example);
            needs = needs.union(pipeline.needs());
        }
        assert!(needs.contains(stage.needs), "{}: examples need {needs:?}", stage.name);
    }
}

#[test]
fn every_default_parses_and_every_bound_refuses() {
    for stage in STAGES.iter() {
        if !matches!(stage.name, "full" | "quant") {
            let (spec, start) = with_stage(stage.class, stage.name);
            let reads_file = stage.examples.iter().any(|example| example.contains("(file="));
            match Pipeline::parse(&spec) {
                Err(error) if reads_file => {
                    let expected = format!("column {start}: file must name a safetensors file");
                    assert_eq!(error.message(), expected, "{spec}");
                }
                result => _ = result.unwrap_or_else(|error| panic!("{spec}: {error}")),
            }
        }
        for param in stage.params {
            let bad: Vec<String> = match param.domain {
                Domain::Int { min, max, .. } => {
                    vec![format!("{}", min - 1), format!("{}", max + 1), "1.5".into(), "x".into()]
                }
                Domain::Real { min, max, .. } => {
                    vec![format!("{}", min - 0.01), format!("{}", max + 0.01), "x".into()]
                }
                Domain::Choice(_) => vec!["nonsense".into(), "1".into()],
                Domain::Text { .. } | Domain::File => vec!["1".into(), "nonsense".into()],
            };
            for value in bad {
                let (spec, start) =
                    with_stage(stage.class, &format!("{}({}={value})", stage.name, param.name));
                let column = start + stage.name.len() + 1;
                let message = error_of(&spec);
                assert!(message.starts_with(&format!("column {column}: ")), "{spec}: {message}");
                assert!(message.contains(param.name) || message.contains(&value), "{message}");
            }
        }
        let (spec, start) = with_stage(stage.class, &format!("{}(bogus=1)", stage.name));
        let message = error_of(&spec);
        let column = start + stage.name.len() + 1;
        assert!(message.starts_with(&format!("column {column}: ")), "{spec}: {message}");
    }
}

#[test]
fn mistakes_name_the_column_and_the_reason() {
    let cases = [
        ("snapkw | keep(0.5)", "column 1: unknown stage \"snapkw\"; known: "),
        ("keep(0.5)", "column 1: keep needs a score"),
        ("adakv(0.2) | keep(0.5)", "column 1: adakv needs a score"),
        ("every(4)", "column 1: every needs a score"),
        ("every(4) | quant(k=q8_0)", "column 1: every needs a score"),
        ("snapkv", "column 1: snapkv does not say how much stays"),
        ("keep(0.5) | snapkv", "column 13: snapkv (Score) cannot follow keep (Keep)"),
        ("snapkv | keep(0.5) | adakv", "column 22: adakv (Budget) cannot follow keep (Keep)"),
        ("snapkv | h2o | keep(0.5)", "column 10: h2o (Score) cannot follow snapkv (Score)"),
        ("h2o | keep(0.5) | keep_tokens(4)", "column 19: keep_tokens (Keep) cannot follow"),
        ("full | keep(0.5)", "column 8: full keeps everything, keep has no effect"),
        ("every(2) | full", "column 1: full keeps everything, every has no effect"),
        ("stream(4, 60) | keep(0.5)", "column 17: stream(4, 60) keeps 64 tokens already"),
        ("h2o(8, 8) | keep_tokens(9)", "column 13: h2o(8, 8) keeps 16 tokens already"),
        ("protect(1) | keep(0.5)", "column 1: protect needs a score"),
        (
            "snapkv | quota(64) | keep(0.5)",
            "column 10: quota scores parts by themselves, but snapkv",
        ),
        ("knorm | chunk | adakv | keep(0.5)", "column 17: chunk decides what stays, adakv has no"),
        ("knorm | chunk | rank | keep(0.5)", "column 17: chunk decides what stays, rank has no"),
        (
            "h2o | critical | global | keep(0.5)",
            "column 18: critical needs the budget of its layer",
        ),
        ("h2o | chunk | tau(1)", "column 7: chunk spends an allowance of tokens, h2o has none"),
        ("h2o | adakv | tau(1)", "column 7: a threshold leaves adakv nothing to spread"),
        ("h2o | global | keep(0.5) | cam", "column 28: cam needs the values of a layer when"),
        ("h2o | keep(0.5) | cam | merge", "column 25: merge (Act) cannot follow cam (Act)"),
        ("h2o | adakv | protect | keep(0.5)", "column 15: protect (Map) cannot follow adakv"),
        ("h2o | entropy_chunk(4, 4) | keep(0.5)", "column 7: entropy_chunk: low is 4, must be"),
        ("h2o | pool(4) | keep(0.5)", "column 7: pool: kernel is 4, must be odd"),
        ("simlayer(recent=4, last=4)", "column 1: simlayer: last is 4, must be below recent 4"),
        ("qfilter | keep(0.5)", "column 1: file must name a safetensors file"),
        ("qfilter(file=\"/none\") | keep(0.5)", "column 9: file is \"/none\", which is not a file"),
        ("qfilter(file=\"Cargo.toml\") | keep(1)", "column 1: file Cargo.toml: "),
        ("snapkv(kernel=4) | keep(0.5)", "column 1: snapkv: kernel is 4, must be odd"),
        ("prefill: every(4) | h2o | keep(0.5)", "column 10: every cannot happen in a phase"),
        ("decode: prefill_end | h2o | keep(0.5)", "column 9: prefill_end cannot happen in"),
        ("h2o | keep(0.5) ; snapkv | keep(0.5)", "column 19: h2o and snapkv both act on Prefill"),
        ("pos(keep) ; pos(keep)", "column 13: pos is given twice"),
        ("quest | quest", "column 9: quest (Select) cannot follow quest (Select)"),
        ("quest ; infllm", "column 9: infllm is given twice"),
        ("quest(tokens=0)", "column 7: tokens is 0, must be a whole number in 1..="),
        ("quest | h2o(8, 8)", "column 9: h2o (Score) cannot follow quest (Select)"),
        ("stream(4, 60) | pos(cache_relative) | quest", "column 39: quest compares queries with"),
        ("quant()", "column 1: quant names no quantizer"),
        ("quant(k=q9)", "column 7: Key quantizer q9: "),
        ("quant(q8_0, q9)", "column 13: Value quantizer q9: "),
        ("h2o(8, 8) | quant(k=kivi(bits=2), v=q8_0)", "column 19: kivi(bits=2) encodes whole"),
        ("quant(kivi2) ; decode: every(64) | h2o(8, 8)", "column 7: kivi2 encodes whole blocks"),
    ];
    for (spec, start) in cases {
        let message = error_of(spec);
        assert!(message.starts_with(start), "{spec}\n  found {message}\n  expected {start}");
    }
    let message = error_of("nonsense");
    assert!(STAGES.iter().all(|stage| message.contains(stage.name)), "{message}");
}

#[test]
fn block_granular_keys_go_with_what_evicts_before_or_by_runs() {
    for spec in ["snapkv | keep(0.5) | quant(k=kivi2, v=kivi2)", "stream(4, 60) | quant(kivi2)"] {
        Pipeline::parse(spec).unwrap_or_else(|error| panic!("{spec}: {error}"));
    }
}

#[test]
fn pipelines_say_what_they_need() {
    let parse = |spec: &str| Pipeline::parse(spec).unwrap();
    let nothing = parse("full");
    assert_eq!((nothing.needs(), nothing.query_window()), (Needs::NONE, 0));
    assert_eq!(nothing.lane_width(), (LaneWidth::Sequence, None));
    assert!(BOTH.iter().all(|event| !nothing.acts_on(*event)));
    assert_eq!(nothing.quantizers(), (None, None));

    let stream = parse("stream(4, 60) | pos(cache_relative) | quant(had+q4_0)");
    assert_eq!(stream.needs(), Needs::ROPE);
    assert_eq!(stream.needed_by(Needs::ROPE), Some("pos"));
    assert_eq!(stream.position_mode(), PositionMode::CacheRelative);
    assert_eq!(stream.lane_width(), (LaneWidth::Sequence, None));
    assert_eq!(stream.quantizers(), (Some("had+q4_0"), Some("had+q4_0")));
    assert_eq!(parse("stream(4, 60) | adakv").lane_width(), (LaneWidth::Head, Some("adakv")));

    let both = parse(
        "prefill: snapkv(w=32) | adakv | keep(0.5) ; decode: every(8) | h2o(8) | keep_tokens(64) \
         | quant(v=q4_0, k=q8_0)",
    );
    assert_eq!(both.needs(), Needs::KEYS.union(Needs::QUERY_WINDOW).union(Needs::COLUMN_SUM));
    assert_eq!(both.needed_by(Needs::COLUMN_SUM), Some("h2o"));
    assert_eq!(both.needed_by(Needs::VALUES), None);
    assert_eq!(both.query_window(), 32);
    assert_eq!(both.lane_width(), (LaneWidth::Head, Some("snapkv")));
    assert_eq!(both.quantizers(), (Some("q8_0"), Some("q4_0")));
    assert_eq!(parse("quant(v=q8_0)").quantizers(), (None, Some("q8_0")));
}

#[test]
fn events_follow_phase_then_trigger_then_score() {
    let cases = [
        ("snapkv | keep(0.5)", [true, false]),
        ("stream | keep(0.5)", [true, false]),
        ("stream | keep_tokens(64)", [true, true]),
        ("stream(recent=60)", [true, true]),
        ("h2o | keep(0.5)", [true, true]),
        ("prefill_end | h2o | keep(0.5)", [true, false]),
        ("every(4) | snapkv | keep(0.5)", [true, true]),
        ("prefill: stream(recent=60)", [true, false]),
        ("decode: snapkv | keep(0.5)", [false, true]),
        ("all: snapkv | keep(0.5)", [true, true]),
        ("all: every(4) | snapkv | keep(0.5)", [true, true]),
        ("quant(q8_0)", [false, false]),
    ];
    for (spec, expected) in cases {
        let pipeline = Pipeline::parse(spec).unwrap_or_else(|error| panic!("{spec}: {error}"));
        assert_eq!(BOTH.map(|event| pipeline.acts_on(event)), expected, "{spec}");
    }
}

#[test]
fn a_pipeline_is_due_when_triggered_and_over_budget() {
    let due = |spec: &str, event, steps, len, seen| {
        Pipeline::parse(spec).unwrap().is_due(event, steps, len, seen)
    };
    let spec = "every(4) | h2o(recent=8) | keep_tokens(64)";
    assert!(!due(spec, Event::PrefillEnd, 0, 64, 64));
    assert!(due(spec, Event::PrefillEnd, 0, 65, 65));
    assert!(!due(spec, Event::Step, 3, 100, 100));
    assert!(due(spec, Event::Step, 4, 100, 100));
    assert!(!due(spec, Event::Step, 4, 64, 100));
    // A short prompt has nothing to lose, however small the budget.
    assert!(!due("snapkv(w=64) | keep(0.1)", Event::PrefillEnd, 0, 64, 64));
    assert!(due("snapkv(w=64) | keep(0.1)", Event::PrefillEnd, 0, 65, 65));
    assert!(!due("snapkv(w=64) | keep(0.1)", Event::Step, 1, 1000, 1000));
    // A ratio counts evicted tokens too.
    assert!(!due("decode: h2o | keep(0.5)", Event::Step, 1, 500, 1000));
    assert!(due("decode: h2o | keep(0.5)", Event::Step, 1, 501, 1000));
}

#[test]
fn what_an_engine_cannot_hand_over_is_refused_with_its_column() {
    use kvmgr::manager::Manager;
    use kvmgr::shape::ModelShape;
    let shape = ModelShape::new(2, 4, 2, 32);
    let refused = |spec: &str, width: Option<LaneWidth>| {
        let mut config = common::config(shape, spec);
        (config.rope, config.lane_width) = (None, width);
        let error = Manager::new(config).expect_err(spec);
        assert_eq!(error.kind(), Kind::Unsupported, "{spec}: {error}");
        error.message().to_string()
    };
    let message = refused("prefill: expected | keep(0.5)", None);
    assert!(message.starts_with("column 10: expected needs ROPE"), "{message}");
    let message = refused("stream(4, 60) | pos(cache_relative)", None);
    assert!(message.starts_with("column 17: pos needs ROPE"), "{message}");
    let message = refused("stream(4, 60) | adakv", Some(LaneWidth::Layer));
    assert!(message.starts_with("column 17: adakv needs lanes of width Head"), "{message}");
}
