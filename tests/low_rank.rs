//! Keys and values that are kept as coordinates in a subspace.

mod common;

use std::collections::HashMap;

use common::{Engine, Random, check, config, relative_error, walk};
use kvmgr::attention::Options;
use kvmgr::cache::OPEN;
use kvmgr::error::Kind;
use kvmgr::manager::{Manager, ManagerConfig, Session};
use kvmgr::shape::{LaneWidth, ModelShape, Values};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

const SHAPE: ModelShape = ModelShape::new(2, 4, 2, 64);
const HEADS: usize = 2;
const DIM: usize = 64;

/// `rank` orthonormal rows of `dim` elements.
fn orthonormal(random: &mut Random, rank: usize, dim: usize) -> Vec<f32> {
    let mut rows: Vec<Vec<f64>> = Vec::new();
    while rows.len() < rank {
        let mut row: Vec<f64> = random.normals(dim).iter().map(|x| f64::from(*x)).collect();
        for other in &rows {
            let shared: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
            row.iter_mut().zip(other).for_each(|(a, b)| *a -= shared * b);
        }
        let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        rows.push(row.iter().map(|x| x / length).collect());
    }
    rows.iter().flatten().map(|x| *x as f32).collect()
}

/// A file with these tensors, `[HEADS, rank, dim]` each.
fn write(tensors: &HashMap<String, (Vec<f32>, usize)>) -> tempfile::NamedTempFile {
    let bytes: HashMap<_, Vec<u8>> = tensors
        .iter()
        .map(|(name, (data, _))| (name, data.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let views: HashMap<_, _> = tensors
        .iter()
        .map(|(name, (data, dim))| {
            let shape = vec![HEADS, data.len() / HEADS / dim, *dim];
            (name, TensorView::new(Dtype::F32, shape, &bytes[name]).expect("a tensor of its shape"))
        })
        .collect();
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    safetensors::serialize_to_file(views, None, file.path()).expect("tensors can be written");
    file
}

/// Bases of every head of [`SHAPE`] with `rank` directions.
fn bases(random: &mut Random, rank: usize) -> HashMap<String, (Vec<f32>, usize)> {
    let names = ["0.key", "0.value", "1.key", "1.value"];
    let one = |name| {
        let heads = (0..HEADS).flat_map(|_| orthonormal(random, rank, DIM)).collect();
        (format!("layers.{name}_basis"), (heads, DIM))
    };
    names.map(one).into()
}

/// Rows of heads in turn, each inside a subspace of its own with `rank` dimensions.
fn rows_within(random: &mut Random, bases: &[Vec<f32>], n: usize) -> Vec<f32> {
    let mut rows = Vec::new();
    for _ in 0..n {
        for basis in bases {
            let mut row = vec![0.0; DIM];
            for direction in basis.chunks_exact(DIM) {
                let weight = random.normal();
                row.iter_mut().zip(direction).for_each(|(x, d)| *x += weight * d);
            }
            rows.extend(row);
        }
    }
    rows
}

/// Whatever the rows are, attention over coordinates is attention over the rows that they stand for.
#[test]
fn pipelines_over_coordinates_agree_with_the_reference() {
    let random = &mut Random(3);
    let file = write(&bases(random, 48));
    let file = format!("basis=\"{}\"", file.path().display());
    let specs = [
        "quant(f16, k_rank=16, v_rank=24)",
        "quant(q8_0, k_rank=32)",
        "quant(k=had+q4_0, v=kivi2, k_rank=32, v_rank=32)",
        "quant(k=kivi4, v=q8_0, v_rank=32)",
        "quant(tq4, k_rank=32, v_rank=32, skip_layers=0, first=4, residual=20)",
        "snapkv(w=8) | keep(0.5) | quant(q8_0, k_rank=32, v_rank=32)",
        "keydiff | adakv | keep(0.5) | merge | quant(q8_0, k_rank=32, v_rank=32)",
        "h2o(recent=16) | keep_tokens(64) | quant(q8_0, k_rank=32, v_rank=32)",
        "stream(sink=2, recent=90) | quant(q8_0, k_rank=32)",
    ];
    for (i, spec) in specs.iter().enumerate() {
        for from_file in [false, true] {
            let spec = if from_file {
                spec.replace("_rank=32)", &format!("_rank=32, {file})"))
            } else {
                (*spec).to_string()
            };
            let mut config = config(SHAPE, &spec);
            config.block_size = 32;
            config.lane_width = random.pick(&[None, Some(LaneWidth::Head)]);
            config.rope = None;
            let mut engine = Engine::new(config, i as u64);
            engine.num_workers = random.within(1, 3);
            let mut session = engine.session();
            walk(&mut engine, &mut session, &[150, 1, 40, 1, 1], [3, 1]);
            let is_low = |block: &kvmgr::cache::Block| {
                engine.manager.cache().formats()[block.view.format()].is_low_rank
            };
            let lanes = session.sequence().lanes();
            assert!(lanes.iter().any(|lane| lane.blocks().any(is_low)), "{spec}");
        }
    }
}

/// What lies in a subspace is kept as it is, whether the subspace is told or found.
#[test]
fn rows_of_low_rank_lose_nothing() {
    let random = &mut Random(8);
    let tensors = bases(random, 12);
    let file = write(&tensors);
    let basis = format!(", basis=\"{}\"", file.path().display());
    for basis in ["", &basis] {
        let spec = format!("quant(f32, k_rank=12, v_rank=12{basis})");
        let engines = [spec.as_str(), "full"].map(|spec| {
            let config = config(SHAPE, spec);
            Engine::new(ManagerConfig { dtype: kvmgr::dtype::DType::F32, ..config }, 1)
        });
        let mut outputs = Vec::new();
        for mut engine in engines {
            let random = &mut Random(9);
            let mut session = engine.session();
            for n in [100, 1] {
                session.sequence_mut().reserve(n).unwrap();
                engine.attention.plan(&[(session.sequence(), n)]).unwrap();
                for layer in 0..2 {
                    let rows = ["key", "value"].map(|side| {
                        let (data, _) = &tensors[&format!("layers.{layer}.{side}_basis")];
                        let heads: Vec<_> =
                            data.chunks_exact(12 * DIM).map(<[f32]>::to_vec).collect();
                        rows_within(random, &heads, n)
                    });
                    engine.append(layer, &rows[0], &rows[1]);
                    let query = random.normals(n * 4 * DIM);
                    if n == 1 {
                        outputs.push(engine.run(layer, query, &Options::default()).output);
                    }
                }
                session.commit(n, None).unwrap();
                session.end_prefill().unwrap();
            }
        }
        let expected = outputs.split_off(2);
        for (found, expected) in outputs.iter().zip(&expected) {
            let expected: Vec<f64> = expected.iter().map(|x| f64::from(*x)).collect();
            let error = relative_error(found, &expected);
            assert!(error < 1e-4, "{basis}: {error}");
        }
    }
}

#[test]
fn bytes_fall_and_bases_are_counted() {
    let manager = Manager::new(config(SHAPE, "quant(f16, k_rank=16, v_rank=32)")).unwrap();
    let formats = manager.cache().formats();
    let sealed = &formats[manager.cache().sealed_format()];
    assert_eq!(sealed.block_bytes * 128, formats[OPEN].block_bytes * 48);

    let mut engine = Engine::new(config(SHAPE, "quant(f16, k_rank=16, v_rank=32)"), 1);
    let mut session = engine.session();
    // Too few rows to fit 32 dimensions to, and then enough.
    for (n, bytes) in [(50, 0), (20, 4 * (16 + 32) * DIM * 4)] {
        let steps = engine.step(&mut [&mut session], &[n]);
        check(&engine, &[&mut session], &[n], &steps, &Options::default());
        session.commit(n, None).unwrap();
        session.end_prefill().unwrap();
        assert_eq!(session.sequence().basis_bytes(), bytes);
        let sealed = session.sequence().lanes()[0].spans.iter().filter(|span| span.sealed).count();
        assert_eq!(sealed, if bytes == 0 { 0 } else { 4 });
    }
    assert_eq!(session.fork().unwrap().sequence().basis_bytes(), 4 * 48 * DIM * 4);
    // The next prompt has its own.
    session.truncate(0).unwrap();
    assert_eq!(session.sequence().basis_bytes(), 0);
    let _ = engine.step(&mut [&mut session], &[80]);
    session.commit(80, None).unwrap();
    assert_eq!(session.sequence().basis_bytes(), 0, "the prompt has not ended");
    session.end_prefill().unwrap();
    assert_eq!(session.sequence().basis_bytes(), 4 * 48 * DIM * 4);
}

/// Rows that are reserved but not written yet are none to fit a subspace to.
#[test]
fn reserved_tokens_do_not_count_as_rows_to_fit_to() {
    let mut engine = Engine::new(config(SHAPE, "quant(f16, k_rank=16, v_rank=16)"), 1);
    let mut session = engine.session();
    let _ = engine.step(&mut [&mut session], &[20]);
    session.commit(20, None).unwrap();
    session.sequence_mut().reserve(100).unwrap();
    session.end_prefill().unwrap();
    assert_eq!(session.sequence().basis_bytes(), 0);
    session.sequence_mut().truncate(20).unwrap();
    let _ = engine.step(&mut [&mut session], &[12]);
    session.commit(12, None).unwrap();
    assert_eq!(session.sequence().basis_bytes(), 4 * 32 * DIM * 4);
}

#[test]
fn prefixes_are_shared_in_the_subspaces_of_a_file_alone() {
    let random = &mut Random(5);
    let file = write(&bases(random, 32));
    let spec = format!("quant(q8_0, k_rank=32, basis=\"{}\")", file.path().display());
    let mut config = config(SHAPE, &spec);
    config.prefix = true;
    let mut engine = Engine::new(config.clone(), 2);
    let tokens: Vec<i32> = (0..65).collect();
    let mut first = engine.session();
    let _ = engine.step(&mut [&mut first], &[64]);
    first.commit(64, Some(&tokens[..64])).unwrap();
    let mut second = engine.session();
    assert_eq!(second.match_prefix(&tokens).unwrap(), 64);
    let steps = engine.step(&mut [&mut second], &[1]);
    check(&engine, &[&mut second], &[1], &steps, &Options::default());
    // Other subspaces, other prefixes.
    let other = write(&bases(random, 32));
    let spec = format!("quant(q8_0, k_rank=32, basis=\"{}\")", other.path().display());
    let other = Manager::new(ManagerConfig { spec, ..config.clone() }).unwrap();
    assert_ne!(engine.manager.cache().root(), other.cache().root());

    let error = Manager::new(ManagerConfig { spec: "quant(q8_0, k_rank=32)".into(), ..config });
    let error = error.unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.message().contains("basis of its own"), "{error}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let random = &mut Random(6);
    let mut tensors = bases(random, 16);
    let file = write(&tensors);
    let path = file.path().display();
    let refused = |shape: ModelShape, spec: &str, part: &str| {
        let error = Manager::new(config(shape, spec)).unwrap_err().to_string();
        assert!(error.contains(part), "{spec}: {error}");
    };
    refused(SHAPE, "quant(f16, k_rank=65)", "k_rank is 65, must be in 1..=64");
    refused(SHAPE, "quant(f16, v_rank=65)", "v_rank is 65, must be in 1..=64");
    refused(SHAPE, "quant(q8_0, k_rank=20)", "dim is 20, must be a multiple of 32");
    refused(SHAPE, "quant(q8_0, k_rank=2000)", "k_rank");
    refused(SHAPE, &format!("quant(q8_0, basis=\"{path}\")"), "column 13: basis has no effect");
    refused(SHAPE, "quant(q8_0, k_rank=32, basis=\"none\")", "column 24: basis is \"none\"");
    let spec = "stream(sink=4, recent=60) | pos(cache_relative) | quant(q8_0, k_rank=32)";
    refused(SHAPE, spec, "column 63: k_rank keeps keys in a subspace");
    let spec = format!("quant(q8_0, k_rank=32, basis=\"{path}\")");
    refused(SHAPE, &spec, "has 16 directions, fewer than the rank 32");
    refused(
        ModelShape::new(3, 4, 2, 64),
        &spec.replace("32", "16").replace("q8_0", "f16"),
        "layers.2",
    );
    let latent = ModelShape { values: Values::InKeys(32), ..ModelShape::new(2, 4, 1, 64) };
    refused(latent, "quant(f16, k_rank=16)", "those of this model are in keys");

    // Twice as long is no coordinate system without its projection.
    let name = "layers.1.key_basis";
    tensors.get_mut(name).unwrap().0.iter_mut().for_each(|x| *x *= 2.0);
    let spec = |file: &tempfile::NamedTempFile| {
        format!("quant(f16, k_rank=16, basis=\"{}\")", file.path().display())
    };
    let file = write(&tensors);
    refused(SHAPE, &spec(&file), "layer 1, key: the rows of a basis");
    let mut half = tensors[name].clone();
    half.0.iter_mut().for_each(|x| *x /= 4.0);
    tensors.insert("layers.1.key_projection".into(), half);
    let file = write(&tensors);
    let manager = Manager::new(config(SHAPE, &spec(&file))).unwrap();
    Session::new(&manager, None).unwrap();
}
