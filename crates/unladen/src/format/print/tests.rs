//! Trees of pickles by hand, as text and as JSON.

use super::*;
use crate::{
    checkpoint::Format,
    format::{Limits, pickle, whole::Parts},
};

fn contents<'a>(pickle: &'a pickle::Pickle<'a>) -> Contents<'a> {
    Contents {
        format: Format::Pth,
        files: Vec::new(),
        arena: &pickle.arena,
        root: pickle.root,
        parts: Parts::default(),
        constants: None,
        warnings: Vec::new(),
    }
}

fn printed(parts: &[&[u8]], style: TreeStyle) -> String {
    tree(parts, style, &OpenOptions::default()).unwrap()
}

/// What is printed of a pickle, or the error.
fn tree(parts: &[&[u8]], style: TreeStyle, options: &OpenOptions) -> std::result::Result<String, String> {
    let bytes = [b"\x80\x02", &parts.concat()[..], b"."].concat();
    let pickle = pickle::read(&bytes, 0, &Limits::default()).unwrap();
    let contents = contents(&pickle);
    let mut all = String::new();
    let mut out = |text: &str| {
        all.push_str(text);
        Ok(())
    };
    let mut writer = Writer { style, text: String::new(), out: &mut out };
    print(&contents, None, options, &mut writer).unwrap().map_err(|error| error.to_string())?;
    writer.flush(0).unwrap();
    Ok(all)
}

const TEXT: TreeStyle = TreeStyle { json: false, full: false };
const JSON: TreeStyle = TreeStyle { json: true, full: false };

fn key(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

#[test]
fn values_are_shown_as_python_writes_them() {
    let parts: [&[u8]; 3] = [
        b"](K\x03J\xff\xff\xff\xffG?\xb9\x99\x99\x99\x99\x99\x9aG\x7f\xf0\0\0\0\0\0\0NX\x03\0\0\0a'\nU\x02\xff\x00\x88\x8a\x09\0\0\0\0\0\0\0\0\x01ctorch\nfloat16\n",
        b"K\x01\x85)",
        b"e",
    ];
    let text = printed(&parts, TEXT);
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let expected =
        r"[|3|-1|0.1|inf|None|'a\'\n'|2 bytes: ff 00|True|18446744073709551616|torch.float16|(1,)|()|]";
    assert_eq!(lines.join("|"), expected);
    assert_eq!(printed(&[b"](K\x03N\x88e"], TEXT), "[3, None, True]");
    assert_eq!(
        printed(&parts, JSON),
        r#"[3,-1,0.1,{"$float":"inf"},null,"a'\u000a",{"$bytes":2,"first":"ff00"},true,18446744073709551616,{"$symbol":"torch.float16"},{"$tuple":[1]},{"$tuple":[]}]"#
    );
}

#[test]
fn objects_show_their_arguments_items_and_state() {
    let state = [b"}", &key("lr")[..], b"K\x02s"].concat();
    let object = [b"cmy\nThing\nK\x07\x85\x81", &state[..], b"b"].concat();
    assert_eq!(printed(&[&object], TEXT), "my.Thing(7) {'lr': 2}");
    assert_eq!(printed(&[&object], JSON), r#"{"$object":"my.Thing","args":[7],"state":{"lr":2}}"#);
    let with_items = [b"cmy\nDict\n)R", &key("a")[..], b"K\x01s"].concat();
    assert_eq!(printed(&[&with_items], TEXT), "my.Dict() {'a': 1}");
}

#[test]
fn dictionaries_with_other_keys_or_attributes_stay_unambiguous() {
    let dict = [b"}(K\0K\x01", &key("0")[..], b"K\x02u"].concat();
    assert_eq!(printed(&[&dict], TEXT), "{\n  0: 1\n  '0': 2\n}");
    assert_eq!(printed(&[&dict], JSON), r#"{"$dict":[[0,1],["0",2]]}"#);
    let dollar = [b"}", &key("$tuple")[..], b"K\x01s"].concat();
    assert_eq!(printed(&[&dollar], JSON), r#"{"$dict":[["$tuple",1]]}"#);
    let attributed = [b"ccollections\nOrderedDict\n)R}", &key("_metadata")[..], b"Nsb"].concat();
    assert_eq!(printed(&[&attributed], TEXT), "{} with {'_metadata': None}");
    assert_eq!(printed(&[&attributed], JSON), r#"{"$value":{},"$attributes":{"_metadata":null}}"#);
}

#[test]
fn what_is_shared_is_shown_once_and_cycles_end() {
    let twice: [&[u8]; 1] = [b"](]q\x01K\x01ah\x01h\x01e"];
    assert_eq!(printed(&twice, TEXT), "[\n  &1 [1]\n  *1\n  *1\n]");
    assert_eq!(printed(&twice, JSON), r#"[{"$shared":1,"$value":[1]},{"$ref":1},{"$ref":1}]"#);
    let cycle: [&[u8]; 1] = [b"]q\x01h\x01a"];
    assert_eq!(printed(&cycle, TEXT), "&1 [\n  *1\n]");
    assert_eq!(printed(&cycle, JSON), r#"{"$shared":1,"$value":[{"$ref":1}]}"#);
}

#[test]
fn long_and_deep_things_are_cut_and_counted_unless_all_is_asked_for() {
    let full = |style| TreeStyle { full: true, ..style };
    let long = [b"](", &b"K\x01".repeat(1000)[..], b"e"].concat();
    assert!(printed(&[&long], TEXT).ends_with("... 980 more\n]"), "{}", printed(&[&long], TEXT));
    assert!(printed(&[&long], JSON).ends_with(r#",{"$cut":980}]"#));
    assert_eq!(printed(&[&long], full(JSON)).matches('1').count(), 1000);
    let text = key(&"ä".repeat(300));
    assert!(printed(&[&text], TEXT).ends_with("'... (600 bytes)"));
    assert!(printed(&[&text], JSON).ends_with(r#"","len_bytes":600}"#));
    assert_eq!(printed(&[&text], full(TEXT)).chars().count(), 302);
    let deep = [&b"]".repeat(500)[..], &b"a".repeat(499)].concat();
    assert!(printed(&[&deep], TEXT).contains("[...]"));
    assert!(printed(&[&deep], JSON).contains(r#"{"$deeper":1}"#));
    let whole = printed(&[&deep], full(TEXT));
    assert_eq!(whole.matches('[').count(), 500);
    assert!(whole.len() < 200_000, "{}", whole.len());
}

#[test]
fn text_that_is_multiplied_is_refused() {
    let names = [&key(&"x".repeat(1000))[..], b"q\x010"].concat();
    let many = [&names[..], b"](", &b"h\x01".repeat(100_000), b"e"].concat();
    let bytes = [b"\x80\x02", &many[..], b"."].concat();
    let pickle = pickle::read(&bytes, 0, &Limits::default()).unwrap();
    let contents = contents(&pickle);
    let mut out = |_: &str| Ok(());
    let style = TreeStyle { full: true, json: true };
    let mut writer = Writer { style, text: String::new(), out: &mut out };
    assert!(print(&contents, None, &OpenOptions::default(), &mut writer).is_err());
}

#[test]
fn nothing_in_a_name_steers_a_terminal() {
    let evil = [b"}", &key("\x1b[31m")[..], &key("\u{9b}31m\u{202e}"), b"s"].concat();
    let text = printed(&[&evil], TEXT);
    assert!(text.chars().all(|it| !it.is_control() || it == '\n'), "{text:?}");
    let symbol: [&[u8]; 1] = [b"c\x1b[31m\nx\n"];
    assert!(!printed(&symbol, TEXT).contains('\x1b'));
}

/// `numpy.dtype(name)` in a byte order.
fn dtype(name: &str, order: &str) -> Vec<u8> {
    let state = [b"(K\x03", &key(order)[..], b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"].concat();
    [b"cnumpy\ndtype\n", &key(name)[..], b"\x89\x88\x87R", &state].concat()
}

/// Bytes as protocol 3 has them.
fn raw(bytes: &[u8]) -> Vec<u8> {
    [b"C", &[bytes.len() as u8][..], bytes].concat()
}

/// A number of NumPy, by its module and its bytes.
fn scalar(module: &str, dtype: &[u8], bytes: &[u8]) -> Vec<u8> {
    [format!("c{module}.multiarray\nscalar\n").as_bytes(), dtype, &raw(bytes), b"\x86R"].concat()
}

/// An array of NumPy, whose sizes are pickled.
fn array(dtype: &[u8], shape: &[u8], is_fortran: bool, bytes: &[u8]) -> Vec<u8> {
    let new = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85C\x01btR(K\x01";
    let order: &[u8] = if is_fortran { b"\x88" } else { b"\x89" };
    [new, shape, dtype, order, &raw(bytes), b"tb"].concat()
}

#[test]
fn numbers_of_numpy_are_shown_as_numbers() {
    let core = "numpy._core";
    for (number, text, json) in [
        (
            scalar(core, &dtype("f4", "<"), &1.5f32.to_le_bytes()),
            "np.float32(1.5)",
            r#""float32","value":1.5"#,
        ),
        (
            scalar("numpy.core", &dtype("f8", ">"), &0.1f64.to_be_bytes()),
            "np.float64(0.1)",
            r#""float64","value":0.1"#,
        ),
        (scalar(core, &dtype("f2", "<"), &[0, 0x3e]), "np.float16(1.5)", r#""float16","value":1.5"#),
        (scalar(core, &dtype("i2", ">"), &[0xff, 0xfe]), "np.int16(-2)", r#""int16","value":-2"#),
        (
            scalar(core, &dtype("u8", "<"), &[0xff; 8]),
            "np.uint64(18446744073709551615)",
            r#""uint64","value":18446744073709551615"#,
        ),
        (scalar(core, &dtype("b1", "|"), &[1]), "np.bool(True)", r#""bool","value":true"#),
        (
            scalar(core, &dtype("f4", "<"), &f32::NEG_INFINITY.to_le_bytes()),
            "np.float32(-inf)",
            r#""float32","value":{"$float":"-inf"}"#,
        ),
        (
            scalar(core, &dtype("c8", ">"), &[1.5f32.to_be_bytes(), (-2f32).to_be_bytes()].concat()),
            "np.complex64(1.5-2.0j)",
            r#""complex64","value":[1.5,-2.0]"#,
        ),
    ] {
        assert_eq!(printed(&[&number], TEXT), text);
        assert_eq!(printed(&[&number], JSON), format!("{{\"$numpy\":{json}}}"));
    }
    // As protocol 2 writes bytes: a letter for each.
    let letters = [
        &b"cnumpy.core.multiarray\nscalar\n"[..],
        &dtype("i4", "<"),
        b"c_codecs\nencode\n",
        &key("\u{ff}\0\0\0"),
        &key("latin1"),
        b"\x86R\x86R",
    ];
    assert_eq!(printed(&letters, TEXT), "np.int32(255)");
}

#[test]
fn arrays_of_numpy_have_a_type_a_shape_and_if_they_are_few_their_values() {
    let bytes: Vec<u8> = (0..6).collect();
    let shape = b"K\x02K\x03\x86";
    let rows = array(&dtype("u1", "|"), shape, false, &bytes);
    assert_eq!(printed(&[&rows], TEXT), "np.array uint8 [2, 3]: [[0, 1, 2], [3, 4, 5]]");
    assert_eq!(printed(&[&rows], JSON), r#"{"$numpy":"uint8","shape":[2,3],"values":[[0,1,2],[3,4,5]]}"#);
    let columns = array(&dtype("u1", "|"), shape, true, &bytes);
    assert_eq!(printed(&[&columns], TEXT), "np.array uint8 [2, 3]: [[0, 2, 4], [1, 3, 5]]");
    let single = array(&dtype("i2", ">"), b")", false, &[1, 0]);
    assert_eq!(printed(&[&single], TEXT), "np.array int16 []: 256");
    let nothing = array(&dtype("i2", ">"), b"K\0K\x03\x86", false, &[]);
    assert_eq!(printed(&[&nothing], TEXT), "np.array int16 [0, 3]: []");
    let buffer = [
        &b"cnumpy._core.numeric\n_frombuffer\n("[..],
        &raw(&[7, 8]),
        &dtype("u1", "|"),
        b"K\x02\x85",
        &key("C"),
        b"tR",
    ];
    assert_eq!(printed(&buffer, TEXT), "np.array uint8 [2]: [7, 8]");
    let long = array(&dtype("u1", "|"), b"K\x64\x85", false, &[1; 100]);
    assert_eq!(printed(&[&long], TEXT), "np.array uint8 [100], 100 bytes");
    assert_eq!(printed(&[&long], JSON), r#"{"$numpy":"uint8","shape":[100]}"#);
    assert_eq!(printed(&[&long], TreeStyle { full: true, ..TEXT }).matches('1').count(), 101);
    // One object wherever it stands.
    let twice: [&[u8]; 4] = [b"](", &rows, b"q\x09h\x09", b"e"];
    assert_eq!(printed(&twice, TEXT), "[\n  &1 np.array uint8 [2, 3]: [[0, 1, 2], [3, 4, 5]]\n  *1\n]");
}

#[test]
fn what_does_not_fit_a_type_of_numpy_is_shown_as_it_stands() {
    let type_of = |name| dtype(name, "<");
    for odd in [
        scalar("numpy._core", &type_of("f4"), &[0; 3]),
        scalar("numpy._core", &type_of("f4"), &[0; 5]),
        scalar("numpy._core", &type_of("M8"), &[0; 8]),
        scalar("numpy._core", b"N", &[0; 8]),
        scalar("mine", &type_of("f4"), &[0; 4]),
        array(&type_of("u1"), b"K\x02K\x03\x86", false, &[0; 5]),
        array(&type_of("u1"), b"J\xff\xff\xff\xff\x85", false, &[]),
        array(&type_of("f8"), b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x87", false, &[0; 8]),
        array(&type_of("V3"), b"K\x02\x85", false, &[0; 6]),
        array(&type_of("u1"), b"K\x02", false, &[0; 2]),
    ] {
        for style in [TEXT, JSON, TreeStyle { full: true, ..TEXT }] {
            let shown = printed(&[&odd], style);
            assert!(shown.contains("multiarray.") && !shown.contains("np."), "{shown}");
        }
    }
}

/// What stands at a path, or the error.
fn at(parts: &[&[u8]], path: &str) -> std::result::Result<String, String> {
    let options = OpenOptions { root: Some(Root::At(path.to_owned())), ..OpenOptions::default() };
    tree(parts, JSON, &options)
}

#[test]
fn a_path_leads_through_keys_indices_and_objects() {
    let object: [&[u8]; 4] =
        [b"cmine\nThing\n(K\x05tR}", &key("a.b"), b"](K\x01}", &[&key("c")[..], b"K\x02se"].concat()];
    let tree = [&object.concat()[..], b"sb"];
    assert_eq!(at(&tree, "a.b").unwrap(), r#"[1,{"c":2}]"#);
    assert_eq!(at(&tree, "a.b.1.c").unwrap(), "2");
    assert_eq!(at(&tree, "a.b.1.").unwrap(), r#"{"c":2}"#);
    // The start of a key.
    assert_eq!(at(&tree, "a").unwrap(), r#"{"a.b":[1,{"c":2}]}"#);
    // Arguments stand at the path of their object.
    assert_eq!(at(&tree, "0").unwrap(), "5");
    let error = at(&tree, "a.b.1.d").unwrap_err();
    assert!(error.contains("`c` below `a.b.1`"), "{error}");
    let error = at(&tree, "x").unwrap_err();
    assert!(error.contains("at the top"), "{error}");
}

#[test]
fn a_path_ends_in_a_cycle_and_among_many_keys() {
    let cycle = [&b"}q\x01"[..], &key("a"), b"h\x01s"];
    assert!(at(&cycle, "a.a.a").unwrap().contains("$ref"));
    assert!(at(&cycle, "a.a.b").unwrap_err().contains("`a` below `a.a`"));
    let attributes = [&b"}q\x01}"[..], &key("x"), b"h\x01sb"];
    assert!(at(&attributes, "y").unwrap_err().contains("`x` at the top"));
    let many: Vec<Vec<u8>> = (0..50u8).map(|it| [b"K", &[it][..], b"N"].concat()).collect();
    let error = at(&[b"}(", &many.concat(), b"u"], "50").unwrap_err();
    assert!(error.contains("`19` and 30 more at the top"), "{error}");
}
