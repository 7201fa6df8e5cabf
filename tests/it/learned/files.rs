//! Files that are damaged, lie or were made to do harm: typed errors, never a panic.

use super::{DIM, HEADS, LAYERS, TOKENS, golden, number};
use kvsieve::Error;
use kvsieve::error::{LearnedError, ShapeError};
use kvsieve::geometry::{LayerShape, MAX_SINK_ENTRIES, ModelShape};
use kvsieve::learned::{Cartridge, Sinks};
use kvsieve::view::DType;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize};
use serde_json::{Value, json};

/// A file's header and data.
fn split(bytes: &[u8]) -> (Value, Vec<u8>) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).unwrap(), bytes[8 + length..].to_vec())
}

fn join(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// The error of a good file after a change of its header or data.
fn changed(change: impl FnOnce(&mut Value, &mut Vec<u8>)) -> LearnedError {
    let (mut header, mut data) = split(&golden("frozen"));
    change(&mut header, &mut data);
    Cartridge::from_bytes(join(&header.to_string(), &data)).unwrap_err()
}

/// The same of one entry of the metadata; `None` takes it away.
fn said(key: &str, value: Option<&str>) -> LearnedError {
    changed(|header, _| {
        let metadata = header["__metadata__"].as_object_mut().unwrap();
        match value {
            Some(value) => metadata.insert(key.to_owned(), json!(value)),
            None => metadata.remove(key),
        };
    })
}

#[test]
fn a_good_file_says_what_it_is() {
    let cartridge = Cartridge::open("tests/golden/cartridge-frozen.safetensors").unwrap();
    assert_eq!((cartridge.model(), cartridge.rope_theta()), (Some("toy"), Some(10_000.0)));
    let layer = cartridge.layer(1);
    assert_eq!((layer.kv_heads, layer.d_k, layer.d_v, layer.k, layer.v), (2, 8, 8, DType::Bf16, DType::Bf16));
    let (mut keys, mut values) = (vec![0.0; TOKENS * DIM], vec![0.0; DIM]);
    for (layer, head) in (0..LAYERS).flat_map(|l| (0..HEADS).map(move |h| (l, h))) {
        cartridge.read(layer, head, &mut keys, &mut values);
        assert_eq!(keys[4 * DIM + 7], number(layer, 0, head, 4, 7));
        assert_eq!(values[3], number(layer, 1, head, 0, 3));
    }
    let error = Cartridge::open("tests/golden/no-such-file").unwrap_err();
    assert!(matches!(&error, LearnedError::Read { path, .. } if path.ends_with("no-such-file")), "{error}");
}

#[test]
fn a_file_cut_off_anywhere_is_damaged() {
    let bytes = golden("frozen");
    for length in 0..bytes.len() {
        let error = Cartridge::from_bytes(bytes[..length].to_vec()).unwrap_err();
        assert!(matches!(&error, LearnedError::Damaged { .. }), "{length} bytes: {error}");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(matches!(Cartridge::from_bytes(longer), Err(LearnedError::Damaged { .. })));
}

#[test]
fn no_changed_byte_of_a_header_panics() {
    let bytes = golden("frozen");
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut refused = 0;
    for at in 0..header {
        for byte in [0, b'"', b'9', b'{', b'\\', 0xff] {
            let mut bytes = bytes.clone();
            bytes[at] = byte;
            // Names, models and spaces may differ; what is promised of tensors may not.
            if let Ok(cartridge) = Cartridge::from_bytes(bytes) {
                assert_eq!((cartridge.layers(), cartridge.tokens()), (LAYERS, TOKENS));
            } else {
                refused += 1;
            }
        }
    }
    assert!(refused > header, "most changes are noticed: {refused} of {}", 6 * header);
}

#[test]
fn headers_whose_numbers_leave_every_range_are_refused() {
    // Each tensor's own size fits a usize; their sum wraps around to the file's.
    let tensor = |start: u64, end: u64| {
        format!("{{\"dtype\":\"I8\",\"shape\":[{}],\"data_offsets\":[{start},{end}]}}", end - start)
    };
    let step = 1u64 << 60;
    let mut offsets: Vec<u64> = (0..16).map(|i| i * step).collect();
    offsets.push(u64::MAX);
    let tensors: Vec<String> = offsets
        .windows(2)
        .enumerate()
        .map(|(i, pair)| format!("\"layers.{i}.k\":{}", tensor(pair[0], pair[1])))
        .collect();
    let header = format!("{{{}}}", tensors.join(","));
    let error = Cartridge::from_bytes(join(&header, &[0; 64])).unwrap_err();
    assert!(error.to_string().contains("its header has numbers of"), "{error}");
    for header in [
        "{\"layers.0.k\":{\"dtype\":\"F32\",\"shape\":[99999999999999999999999],\"data_offsets\":[0,4]}}",
        "{\"layers.0.k\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,4]}}",
        "{\"layers.0.k\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}",
        "{\"layers.0.k\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}",
        "{\"layers.0.k\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}",
        "{\"layers.0.k\":{\"dtype\":\"F32\",\"shape\":[1.5],\"data_offsets\":[0,4]}}",
        "{\"__metadata__\":{\"a\\\"9999999\":\"9999999\"},\"layers.0.k\":[]}",
        "[[[[[[[[[[[[[[",
        "",
    ] {
        let error = Cartridge::from_bytes(join(header, &[0; 4])).unwrap_err();
        assert!(matches!(&error, LearnedError::Damaged { .. }), "{header}: {error}");
    }
    let error = Cartridge::from_bytes([&u64::MAX.to_le_bytes()[..], &[0; 64]].concat()).unwrap_err();
    assert!(matches!(&error, LearnedError::Damaged { .. }), "{error}");
    // Text may hold any digits.
    let (mut header, data) = split(&golden("frozen"));
    header["__metadata__"]["model"] = json!("sha256:9999999999999999999999 \" \\ 8888888888");
    Cartridge::from_bytes(join(&header.to_string(), &data)).unwrap();
}

#[test]
fn metadata_that_cannot_be_so_is_named() {
    for (key, value, want) in [
        ("format", Some("other"), "kvsieve-cartridge"),
        ("format", None, "kvsieve-cartridge"),
        ("version", Some("2"), "must be 1"),
        ("layers", Some("3"), "2 by the file's tensors"),
        ("layers", Some("0"), "1 or more"),
        ("layers", Some("two"), "the number of layers"),
        ("layers", Some("18446744073709551615"), "2 by the file's tensors"),
        ("tokens", None, "the number of entries"),
        ("tokens", Some("0"), "nothing to load"),
        ("tokens", Some("-5"), "the number of entries"),
        ("frozen", Some("6"), "at most tokens = 5"),
        ("kv_heads", Some("4"), "2, as in the tensors of layer 0"),
        ("head_dim", Some("16"), "8, as in the tensors of layer 0"),
        ("value_dim", Some("x"), "8, as in the tensors of layer 0"),
        ("rope_theta", Some("NaN"), "finite"),
        ("rope_theta", Some("inf"), "finite"),
        ("rope_theta", Some("1"), "above 1"),
    ] {
        let refused = match said(key, value) {
            // Three layers of two files' worth of tensors: the third has none.
            LearnedError::Missing { tensor, layers: 3 } if key == "layers" => {
                assert_eq!(tensor, "layers.2.k");
                continue;
            }
            error => error,
        };
        assert!(matches!(&refused, LearnedError::Metadata { key: named, .. } if *named == key), "{refused}");
        assert!(refused.to_string().contains(want), "{refused}");
    }
    let unexpected = said("layers", Some("1"));
    assert_eq!(unexpected, LearnedError::Unexpected { tensor: "layers.1.k".to_owned(), layers: 1 });
    let error = said("tokens", Some("6"));
    assert!(matches!(&error, LearnedError::Extents { got, .. } if got == &[2, 5, 8]), "{error}");
}

#[test]
fn tensors_that_are_not_those_of_a_cartridge_are_named() {
    let rename = |from: &'static str, to: &'static str| {
        changed(|header, _| {
            let tensor = header.as_object_mut().unwrap().remove(from).unwrap();
            header[to] = tensor;
        })
    };
    let layers = LAYERS;
    for name in ["layers.01.v", "layers.1.q", "layers.-1.v", "layers.+1.v", "optimizer", "layers.2.v"] {
        let error = rename("layers.1.v", name);
        assert_eq!(error, LearnedError::Unexpected { tensor: name.to_owned(), layers });
    }
    let error = changed(|header, data| {
        // The last tensor, and its bytes.
        header.as_object_mut().unwrap().remove("layers.1.v");
        data.truncate(480);
    });
    assert_eq!(error, LearnedError::Missing { tensor: "layers.1.v".to_owned(), layers });
    let with = |key: &'static str, value: Value| changed(|header, _| header["layers.1.v"][key] = value);
    let error = with("dtype", json!("I16"));
    assert_eq!(error, LearnedError::ElementType { tensor: "layers.1.v".to_owned(), got: "I16".to_owned() });
    assert!(error.to_string().contains("must be F32, F16 or BF16"), "{error}");
    for extents in [json!([2, 40]), json!([1, 2, 5, 8]), json!([2, 8, 5]), json!([80]), json!([10, 1, 8])] {
        let error = with("shape", extents.clone());
        assert!(
            matches!(&error, LearnedError::Extents { tensor, .. } if tensor == "layers.1.v"),
            "{extents}: {error}"
        );
    }
    let error = with("shape", json!([1, 5, 16]));
    assert!(error.to_string().contains("2 KV heads, as the keys"), "{error}");
    // Offsets into another tensor.
    let error = with("data_offsets", json!([0, 160]));
    assert!(matches!(&error, LearnedError::Damaged { .. }), "{error}");
}

#[test]
fn what_is_not_finite_is_found_wherever_it_stands() {
    // Two bytes of bfloat16 each: NaN and both infinities.
    for (bits, text) in [(0x7fc0u16, "NaN"), (0x7f80, "inf"), (0xff80, "-inf")] {
        for (layer, side, head, entry, dim) in [(0, 0, 0, 0, 0), (0, 1, 1, 2, 3), (1, 1, 1, 4, 7)] {
            let error = changed(|_, data| {
                let at = ((layer * 2 + side) * HEADS + head) * TOKENS * DIM + entry * DIM + dim;
                data[2 * at..2 * at + 2].copy_from_slice(&bits.to_le_bytes());
            });
            let LearnedError::NonFinite { tensor, head: h, entry: e, dim: d, .. } = &error else {
                panic!("{error}")
            };
            let name = format!("layers.{layer}.{}", ["k", "v"][side]);
            assert_eq!((tensor, *h, *e, *d), (&name, head, entry, dim));
            assert!(error.to_string().contains(&format!("has {text} at KV head {head}")), "{error}");
        }
    }
}

/// A file of sinks with these tensors: name, extents, and the first number, which the others count up from.
fn sinks(layers: &str, tensors: &[(&str, &[usize], f32)]) -> Vec<u8> {
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, extents, first)| {
            let count: usize = extents.iter().product();
            (0..count).flat_map(|i| (first + i as f32).to_le_bytes()).collect()
        })
        .collect();
    let views = tensors.iter().zip(&data).map(|((name, extents, _), data)| {
        (name.to_string(), TensorView::new(Dtype::F32, extents.to_vec(), data).unwrap())
    });
    let metadata = [("format", "kvsieve-sinks"), ("version", "1"), ("layers", layers)];
    let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_owned()));
    serialize(views, Some(metadata.into_iter().collect())).unwrap()
}

#[test]
fn sinks_become_part_of_the_shape() {
    let mut layer = LayerShape::new(4, 2, 3);
    layer.d_v = 2;
    let shape = ModelShape::uniform(3, layer).unwrap();
    let file = sinks(
        "3",
        &[
            ("layers.0.k", &[2, 1, 3], 1.0),
            ("layers.0.v", &[2, 1, 2], 10.0),
            ("layers.2.bias", &[2, 2], -3.0),
            ("layers.2.logits", &[4], 0.5),
        ],
    );
    let with = Sinks::from_bytes(file).unwrap().apply(&shape).unwrap();
    let first = with.layer(0).sink_entries.clone().unwrap();
    assert_eq!((first.entries, first.bias), (1, None));
    assert_eq!(first.keys.unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(first.values.unwrap(), [10.0, 11.0, 12.0, 13.0]);
    assert_eq!((with.layer(0).sink_logits.as_ref(), with.layer(1)), (None, shape.layer(1)));
    let last = with.layer(2).sink_entries.clone().unwrap();
    assert_eq!((last.entries, last.keys, last.values), (2, None, None));
    assert_eq!(last.bias.unwrap(), [-3.0, -2.0, -1.0, 0.0]);
    assert_eq!(with.layer(2).sink_logits.as_deref().unwrap(), [0.5, 1.5, 2.5, 3.5]);
}

#[test]
fn sinks_that_do_not_fit_are_named() {
    let shape = ModelShape::uniform(2, LayerShape::new(4, 2, 3)).unwrap();
    let apply = |layers, tensors: &[(&str, &[usize], f32)]| {
        Sinks::from_bytes(sinks(layers, tensors)).unwrap().apply(&shape).unwrap_err()
    };
    let error = apply("3", &[("layers.0.k", &[2, 1, 3], 1.0)]);
    assert!(matches!(&error, Error::Learned(LearnedError::Metadata { key: "layers", .. })), "{error}");
    for (name, extents) in [
        ("layers.1.k", &[2, 1, 4][..]),
        ("layers.1.k", &[4, 1, 3]),
        ("layers.1.k", &[6]),
        ("layers.1.v", &[2, 3]),
        ("layers.1.bias", &[2, 1, 1]),
        ("layers.1.logits", &[2]),
    ] {
        let error = apply("2", &[(name, extents, 1.0)]);
        let Error::Learned(LearnedError::Extents { tensor, got, .. }) = &error else { panic!("{error}") };
        assert_eq!((tensor.as_str(), got.as_slice()), (name, extents));
    }
    let error = apply("2", &[("layers.1.k", &[2, 1, 3], 1.0), ("layers.1.v", &[2, 2, 3], 1.0)]);
    assert!(
        error.to_string().contains("layers.1.v has the extents [2, 2, 3], must have [2, 1, 3]"),
        "{error}"
    );
    let many = MAX_SINK_ENTRIES + 1;
    let error = apply("2", &[("layers.1.bias", &[2, many], 1.0)]);
    assert!(matches!(&error, Error::Shape(ShapeError::Geometry { layer: 1, .. })), "{error}");
    let parse = |tensors: &[(&str, &[usize], f32)]| Sinks::from_bytes(sinks("2", tensors)).unwrap_err();
    let error = parse(&[("layers.2.k", &[2, 1, 3], 1.0)]);
    assert_eq!(error, LearnedError::Unexpected { tensor: "layers.2.k".to_owned(), layers: 2 });
    let error = parse(&[("layers.0.logits", &[4], f32::INFINITY)]);
    assert!(matches!(&error, LearnedError::NonFinite { head: 0, entry: 0, dim: 0, .. }), "{error}");
    let error = Sinks::from_bytes(golden("frozen")).unwrap_err();
    assert!(error.to_string().contains("format = kvsieve-cartridge, must be kvsieve-sinks"), "{error}");
}
