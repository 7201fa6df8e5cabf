//! `scripts/convert-cartridge.py`: what torch itself saved comes out as it went in, and nothing that a pickle asks for is ever
//! done. `scripts/golden-cartridge.py` made the files of torch; hostile ones are assembled here.

use super::golden;
use kvsieve::learned::Cartridge;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder of one test's own.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cartridges").join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// Runs the converter; `None` only where the absence of Python was excused.
fn convert(input: &Path, output: &Path, options: &[&str]) -> Option<Output> {
    let run = Command::new("python3")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/convert-cartridge.py"))
        .args([input, output])
        .args(options)
        // Where a pickle that is obeyed would leave its traces.
        .current_dir(output.parent().unwrap())
        .output();
    match run {
        Ok(output) => Some(output),
        Err(error) if std::env::var("KVSIEVE_ALLOW_NO_PYTHON").is_ok_and(|v| v == "1") => {
            println!("NOT CHECKED: the converter of cartridges: {error}");
            None
        }
        Err(error) => panic!("python3: {error} (where there is none, KVSIEVE_ALLOW_NO_PYTHON=1 excuses it)"),
    }
}

fn saved_by_torch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/cartridge-{name}.pt"))
}

#[test]
fn files_of_torch_are_converted_to_the_byte() {
    let folder = folder("good");
    for name in ["frozen", "plain", "halves"] {
        let out = folder.join(name);
        let options = ["--model", "toy", "--rope-theta", "10000"];
        let Some(run) = convert(&saved_by_torch(name), &out, &options) else { return };
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        assert_eq!(std::fs::read(&out).unwrap(), golden(name), "{name}");
        // Without options the file says nothing of the model.
        assert!(convert(&saved_by_torch(name), &out, &[]).unwrap().status.success());
        let cartridge = Cartridge::open(&out).unwrap();
        assert_eq!((cartridge.model(), cartridge.rope_theta()), (None, None));
    }
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 3, "nothing else is left behind");
}

/// Checks that a file is refused with these words, and that nothing is left: no output, and no trace of code that ran.
fn refused(folder: &Path, bytes: &[u8], words: &str) {
    let (input, output) = (folder.join("in.pt"), folder.join("out.safetensors"));
    std::fs::write(&input, bytes).unwrap();
    let Some(run) = convert(&input, &output, &[]) else { return };
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert_eq!(run.status.code(), Some(1), "{words}: {said}");
    assert!(said.contains(words) && !said.contains("Traceback"), "{words}: {said}");
    std::fs::remove_file(&input).unwrap();
    let left: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{words}: {left:?}");
}

/// The checksum of zip archives.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |c, _| if c & 1 == 1 { (c >> 1) ^ 0xedb8_8320 } else { c >> 1 })
    })
}

/// A zip archive of members as they are; `method` is what their headers say of their compression.
fn zip(members: &[(&str, &[u8])], method: u16) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in members {
        let start = out.len() as u32;
        let (version, nothing) = (20u16.to_le_bytes(), [0u8; 2]);
        let mut common = Vec::new();
        common.extend([version, nothing, method.to_le_bytes(), nothing, nothing].concat());
        common.extend(crc32(data).to_le_bytes());
        common.extend((data.len() as u32).to_le_bytes());
        common.extend((data.len() as u32).to_le_bytes());
        common.extend((name.len() as u16).to_le_bytes());
        common.extend(nothing);
        out.extend([b"PK\x03\x04", &common[..], name.as_bytes(), data].concat());
        directory.extend([b"PK\x01\x02", &version[..], &common[..], &[0; 10]].concat());
        directory.extend(start.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let (start, count) = (out.len() as u32, members.len() as u16);
    out.extend(&directory);
    out.extend([b"PK\x05\x06", &[0u8; 4][..]].concat());
    out.extend([count.to_le_bytes(), count.to_le_bytes()].concat());
    out.extend((directory.len() as u32).to_le_bytes());
    out.extend(start.to_le_bytes());
    out.extend([0; 2]);
    out
}

/// An archive as torch makes them, with this pickle and one storage of 80 halves.
fn archive(pickle: &[u8]) -> Vec<u8> {
    zip(&[("a/data.pkl", pickle), ("a/byteorder", b"little"), ("a/data/0", &[0x3c; 160])], 0)
}

fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

fn int(n: i32) -> Vec<u8> {
    [b"J", &n.to_le_bytes()[..]].concat()
}

fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
    [b"(", items.concat().as_slice(), b"t"].concat()
}

fn ints(items: &[i32]) -> Vec<u8> {
    tuple(&items.iter().map(|&n| int(n)).collect::<Vec<_>>())
}

fn call(name: &str, arguments: &[Vec<u8>]) -> Vec<u8> {
    [b"c", name.as_bytes(), b"\n", &tuple(arguments), b"R"].concat()
}

/// What stands in a pickle for a tensor in storage `key`, of which `count` elements are said to be there.
fn stored(kind: &str, key: &str, count: i32, offset: i32, size: &[i32], stride: &[i32]) -> Vec<u8> {
    let kind = [b"ctorch\n", kind.as_bytes(), b"\n"].concat();
    let storage =
        [tuple(&[text("storage"), kind, text(key), text("cpu"), int(count)]), b"Q".to_vec()].concat();
    let hooks = b"ccollections\nOrderedDict\n)R".to_vec();
    let size = ints(size);
    call(
        "torch._utils\n_rebuild_tensor_v2",
        &[storage, int(offset), size, ints(stride), b"\x89".to_vec(), hooks],
    )
}

fn tensor(size: &[i32]) -> Vec<u8> {
    let [_, heads, entries, dim] = *size else { return stored("HalfStorage", "0", 80, 0, size, size) };
    stored("HalfStorage", "0", 80, 0, size, &[heads * entries * dim, entries * dim, dim, 1])
}

fn list(items: &[Vec<u8>]) -> Vec<u8> {
    [b"](", items.concat().as_slice(), b"e"].concat()
}

fn pickle(items: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let items: Vec<Vec<u8>> = items.iter().map(|(key, value)| [text(key), value.clone()].concat()).collect();
    [b"\x80\x02}(", items.concat().as_slice(), b"u."].concat()
}

/// A cartridge of one layer with these tensors.
fn cartridge(keys: Vec<u8>, values: Vec<u8>) -> Vec<u8> {
    archive(&pickle(&[("trainable_keys", list(&[keys])), ("trainable_values", list(&[values]))]))
}

#[test]
fn what_is_assembled_here_is_a_cartridge_where_it_is_whole() {
    let folder = folder("assembled");
    let (input, output) = (folder.join("in.pt"), folder.join("out"));
    // Strides of any order: heads innermost, as a transposed view has them.
    let turned = stored("HalfStorage", "0", 80, 0, &[1, 2, 5, 8], &[80, 1, 16, 2]);
    std::fs::write(&input, cartridge(tensor(&[1, 2, 5, 8]), turned)).unwrap();
    let Some(run) = convert(&input, &output, &[]) else { return };
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let cartridge = Cartridge::open(&output).unwrap();
    assert_eq!((cartridge.layers(), cartridge.tokens(), cartridge.frozen()), (1, 5, 0));
}

#[test]
fn code_in_a_pickle_is_refused_and_not_run() {
    let folder = folder("code");
    let shell = text("touch trace");
    let refuse = |pickle: &[u8], words: &str| refused(&folder, &archive(pickle), words);
    refuse(
        &[call("posix\nsystem", std::slice::from_ref(&shell)), b".".to_vec()].concat(),
        "names posix.system",
    );
    let eval = text("open('trace', 'w')");
    refuse(
        &[call("builtins\neval", std::slice::from_ref(&eval)), b".".to_vec()].concat(),
        "names builtins.eval",
    );
    refuse(&[call("builtins\nset.__class__", &[]), b".".to_vec()].concat(), "names builtins.set.__class__");
    // By protocol 4: a name from the stack.
    let named = [b"\x80\x04", &text("os")[..], &text("system"), b"\x93", &shell, b"\x85R."].concat();
    refuse(&named, "names os.system");
    // By the opcodes that make objects of classes.
    refuse(&[b"(", &shell[..], b"iposix\nsystem\n."].concat(), "the opcode INST");
    refuse(&[b"(cposix\nsystem\n", &shell[..], b"o."].concat(), "names posix.system");
    refuse(b"(ccollections\nOrderedDict\no.", "the opcode OBJ");
    refuse(b"\x82\x01.", "the opcode EXT1");
    refuse(b"ccollections\nOrderedDict\n)\x81.", "no list of parameters");
    // Among what a cartridge has, where its numbers should be.
    let hidden = pickle(&[("trainable_keys", call("posix\nsystem", std::slice::from_ref(&shell)))]);
    refuse(&hidden, "names posix.system");
    // Known names, called as no cartridge does.
    refuse(
        &[call("builtins\nset", std::slice::from_ref(&shell)), b".".to_vec()].concat(),
        "a call of builtins.set",
    );
    refuse(&[&shell[..], b"(tR."].concat(), "a call of something that is no name");
    refuse(b"ccollections\nOrderedDict\n)R}b.", "where a ParameterList belongs");
    refuse(b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "with 0 arguments");
}

#[test]
fn damaged_pickles_and_archives_are_refused() {
    let folder = folder("damaged");
    let refuse = |pickle: &[u8], words: &str| refused(&folder, &archive(pickle), words);
    for (pickle, words) in [
        (&b""[..], "damaged pickle"),
        (b"\x80\x02", "damaged pickle"),
        (b".", "takes more than it has"),
        (b"(.", "takes more than it has"),
        (b"t.", "takes more than it has"),
        (b"h\x07.", "refers to what it did not say"),
        (b"}](u.", "where a dict belongs"),
        (b"}(K\x01u.", "no dictionary"),
        (b"}]K\x01s.", "a key that is no text"),
        (b"X\xff\xff\xff\x7fx.", "damaged pickle"),
        (b"].", "no dictionary"),
        (b"}.", "no trainable_keys"),
    ] {
        refuse(pickle, words);
    }
    let good = pickle(&[]);
    refused(&folder, &zip(&[("a/data.pkl", &good)], 8), "a compressed member");
    refused(&folder, &zip(&[("a/data.pkl", &good), ("b/data.pkl", &good)], 0), "2 members data.pkl");
    refused(&folder, &zip(&[("a/data.pkl", &good), ("a/data.pkl", &good)], 0), "two members of one name");
    refused(&folder, &zip(&[("a/x", &good)], 0), "0 members data.pkl");
    refused(&folder, &zip(&[("a/data.pkl", &good), ("a/byteorder", b"big")], 0), "big-endian");
    let whole = std::fs::read(saved_by_torch("frozen")).unwrap();
    refused(&folder, &whole[..whole.len() / 2], "not a zip archive");
    let mut flipped = whole.clone();
    let at = flipped.windows(8).position(|w| w == b"training").unwrap();
    flipped[at] ^= 1;
    refused(&folder, &flipped, "Bad CRC-32");
    refused(&folder, &std::fs::read(saved_by_torch("legacy")).unwrap(), "saved by torch before 1.6");
}

#[test]
fn tensors_that_lie_are_refused() {
    let folder = folder("tensors");
    let whole = tensor(&[1, 2, 5, 8]);
    let strides = [80, 40, 8, 1];
    let refuse = |keys: Vec<u8>, words: &str| refused(&folder, &cartridge(keys, whole.clone()), words);
    let half = |key, count, offset, size: [i32; 4], stride: &[i32]| {
        stored("HalfStorage", key, count, offset, &size, stride)
    };
    refuse(half("0", 81, 0, [1, 2, 5, 8], &strides), "storage 0 has 160 bytes, 81 elements of 2");
    refuse(half("0", 80, 1, [1, 2, 5, 8], &strides), "reaches to element 80 of a storage of 80");
    refuse(half("0", 80, 0, [1, 2, 5, 8], &[80, 48, 8, 1]), "reaches to element 87");
    refuse(half("0", 80, -1, [1, 2, 5, 8], &strides), "no whole numbers from 0");
    refuse(half("0", 80, 0, [1, 2, 5, -8], &strides), "no whole numbers from 0");
    refuse(half("0", 80, 0, [1, 2, 5, 8], &[80, 40, 8]), "more extents than strides");
    // One element, said to be a cache of gigabytes.
    refuse(half("0", 80, 0, [1, 1 << 20, 5, 1 << 20], &[0, 0, 0, 0]), "in a storage of 80");
    refuse(half("1", 80, 0, [1, 2, 5, 8], &strides), "no member data/1");
    refuse(half("../byteorder", 80, 0, [1, 2, 5, 8], &strides), "no member data/../byteorder");
    refuse(stored("LongStorage", "0", 20, 0, &[1, 2, 5, 2], &[20, 10, 2, 1]), "names torch.LongStorage");
    refuse(tensor(&[2, 1, 5, 8]), "has the extents [2, 1, 5, 8]");
    refuse(stored("HalfStorage", "0", 80, 0, &[80], &[1]), "has the extents [80]");
    refuse(tensor(&[1, 2, 4, 8]), "of different numbers of entries");
    refuse(tensor(&[1, 2, 0, 8]), "of different numbers of entries");
    refuse(b"N".to_vec(), "layer 0 is no tensor");
    let floats = stored("FloatStorage", "0", 40, 0, &[1, 2, 1, 8], &[16, 8, 8, 1]);
    let parts = |keys: Vec<Vec<u8>>, fixed: Vec<Vec<u8>>, values: Vec<Vec<u8>>, words: &str| {
        let items = [
            ("trainable_keys", list(&keys)),
            ("fixed_keys", list(&fixed)),
            ("trainable_values", list(&values)),
        ];
        refused(&folder, &archive(&pickle(&items)), words);
    };
    let w = || whole.clone();
    parts(vec![w()], vec![floats], vec![w()], "fixed F32 beside trainable F16");
    parts(
        vec![w()],
        vec![tensor(&[1, 1, 1, 8])],
        vec![w()],
        "fixed [1, 1, 1, 8] beside trainable [1, 2, 5, 8]",
    );
    parts(vec![w(), w()], vec![w()], vec![w(), w()], "fixed_keys has 1 layers, trainable_keys has 2");
    parts(vec![w(), w()], vec![], vec![w()], "keys of 2 layers, values of 1");
}
