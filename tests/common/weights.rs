//! Files of weights for the stages that read one.

use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tempfile::NamedTempFile;

/// The attention shape of a model and the elements of its hidden states.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub layers: usize,
    pub heads: usize,
    pub group: usize,
    pub dim: usize,
    pub hidden: usize,
}

/// `spec` with the path of `file` instead of every file that it names.
pub fn with_file(spec: &str, file: &Path) -> String {
    let path = file.to_str().expect("a path in UTF-8");
    let part = |(i, part): (usize, &str)| {
        if i % 2 == 1 && part.ends_with(".safetensors") { path.to_string() } else { part.into() }
    };
    spec.split('"').enumerate().map(part).collect::<Vec<_>>().join("\"")
}

/// A file that suits every stage.
pub fn write(shape: Shape) -> NamedTempFile {
    let Shape { layers, heads, group, dim, hidden } = shape;
    let inner = 4;
    let mut tensors = vec![
        ("curve".to_string(), vec![99, layers, heads]),
        ("scores".to_string(), vec![layers, heads]),
        ("alpha".to_string(), vec![layers, heads]),
    ];
    for layer in 0..layers {
        let parts = [
            ("filter", vec![heads, dim]),
            ("weight", vec![heads, hidden]),
            ("bias", vec![heads]),
            ("q_proj.weight", vec![heads * group * inner, hidden]),
            ("q_proj.bias", vec![heads * group * inner]),
            ("k_proj.weight", vec![heads * inner, hidden]),
            ("q_norm.weight", vec![inner]),
            ("k_norm.weight", vec![inner]),
            ("k_base", vec![heads, 1, 3, inner]),
            ("b", vec![heads, 1, group]),
        ];
        tensors.extend(parts.map(|(name, shape)| (format!("layers.{layer}.{name}"), shape)));
    }
    let value = |i: usize| ((i * 37 % 101) as f32) / 101.0;
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, shape)| {
            let count = shape.iter().product();
            (0..count).flat_map(|i| value(i).to_le_bytes()).collect()
        })
        .collect();
    let views = tensors.iter().zip(&data).map(|((name, shape), data)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), data);
        (name.as_str(), view.expect("data of the shape"))
    });
    let file = tempfile::Builder::new().suffix(".safetensors").tempfile();
    let file = file.expect("a temporary file");
    safetensors::serialize_to_file(views, None, file.path()).expect("weights can be written");
    file
}
