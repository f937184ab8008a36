//! Small pickles by hand, one per rule.

use super::*;
use crate::{format::window::Window, source::MemorySource};
use proptest::prelude::*;

fn value(bytes: &[u8]) -> Value {
    read(bytes, 0, &Limits::default()).unwrap().root
}

fn items(bytes: &[u8]) -> Vec<(Value, Value)> {
    let pickle = read(bytes, 0, &Limits::default()).unwrap();
    let Value::Dict(dict) = pickle.root else { panic!("{:?}", pickle.root) };
    pickle.arena.dicts[dict as usize].items.clone()
}

#[test]
fn values_that_wait_are_counted_with_the_objects() {
    let tuple = |n_items: usize| [b"\x80\x02(", &b"K\x01".repeat(n_items)[..], b"t."].concat();
    let limits = Limits { n_objects: 20, ..Limits::default() };
    assert!(read(&tuple(8), 0, &limits).is_ok());
    let error = read(&tuple(9), 0, &limits).unwrap_err();
    assert!(error.hint().contains("--limit n_objects="), "{error} {}", error.hint());
    assert!(read(&tuple(9), 0, &Limits { n_objects: 40, ..limits }).is_ok());
}

#[test]
fn integers_of_every_opcode_keep_their_sign() {
    assert_eq!(value(b"\x80\x02K\xff."), Value::Int(Wide(255)));
    assert_eq!(value(b"\x80\x02J\xff\xff\xff\xff."), Value::Int(Wide(-1)));
    assert_eq!(value(b"\x80\x02\x8a\x00."), Value::Int(Wide(0)));
    assert_eq!(value(b"\x80\x02\x8a\x01\xff."), Value::Int(Wide(-1)));
    assert_eq!(value(b"\x80\x02\x8a\x02\xff\x00."), Value::Int(Wide(255)));
    assert_eq!(value(b"\x80\x02\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\xff."), Value::Int(Wide(-1)));
    assert!(matches!(value(b"\x80\x02\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x00."), Value::Long(_)));
    assert!(matches!(value(b"\x80\x02\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\xff."), Value::Long(_)));
    assert_eq!(value(b"\x80\x02G\x3f\xf8\0\0\0\0\0\0."), Value::Float(Wide(1.5)));
}

#[test]
fn the_memo_holds_references_and_memoize_counts() {
    // The dictionary goes into the memo empty, gets an item, is dropped, and comes back with it.
    assert_eq!(items(b"\x80\x02}q\x00K\x01K\x02s0h\x00."), [(Value::Int(Wide(1)), Value::Int(Wide(2)))]);
    assert_eq!(items(b"\x80\x04}\x94K\x07\x94h\x01s."), [(Value::Int(Wide(7)), Value::Int(Wide(7)))]);
}

#[test]
fn the_last_of_two_equal_keys_counts_at_the_place_of_the_first() {
    let mut pickle =
        read(b"\x80\x02}(U\x01aK\x01K\x05K\x02\x88K\x03U\x01aK\x04K\x01K\x06u.", 0, &Limits::default())
            .unwrap();
    assert_eq!(pickle.arena.merge_duplicate_keys(9), ["a", "1"]);
    let values: Vec<_> = pickle.arena.dicts[0].items.iter().map(|it| it.1).collect();
    assert_eq!(values, [Value::Int(Wide(4)), Value::Int(Wide(2)), Value::Int(Wide(6))]);
}

#[test]
fn long_dictionaries_merge_their_keys_as_short_ones_do() {
    let mut bytes = b"\x80\x02}(".to_vec();
    (0..200u8).for_each(|it| bytes.extend([b'K', it % 150, b'K', it]));
    bytes.extend(b"u.");
    let mut pickle = read(&bytes, 0, &Limits::default()).unwrap();
    assert_eq!(pickle.arena.merge_duplicate_keys(7).len(), 7);
    let items = &pickle.arena.dicts[0].items;
    assert_eq!((items.len(), items[3]), (150, (Value::Int(Wide(3)), Value::Int(Wide(153)))));
}

#[test]
fn state_of_an_ordered_dictionary_adds_no_items() {
    let bytes = b"\x80\x02ccollections\nOrderedDict\n)R}U\x09_metadataK\x01sb.";
    assert_eq!(items(bytes), []);
}

#[test]
fn calls_of_unknown_code_are_kept_and_of_plain_containers_become_them() {
    assert!(matches!(value(b"\x80\x02cos\nsystem\nU\x04true\x85R."), Value::Call(_)));
    assert!(matches!(value(b"\x80\x04\x8c\x05torch\x8c\x04Size\x93K\x01K\x02\x86\x85R."), Value::Tuple(_)));
    assert!(matches!(value(b"\x80\x02c__builtin__\nset\n](K\x01K\x02e\x85R."), Value::List(_)));
    assert_eq!(
        items(b"\x80\x02ccollections\nOrderedDict\n](](K\x01K\x02ee\x85R."),
        [(Value::Int(Wide(1)), Value::Int(Wide(2)))]
    );
}

#[test]
fn what_python_cannot_do_is_an_error_with_its_place() {
    let cases: &[(&[u8], &str)] = &[
        (b"", "1 more bytes"),
        (b"\x80\x02K", "1 more bytes"),
        (b"\x80\x02.", "a value on the pickle's stack"),
        (b"\x80\x02K\x01(00.", "a value on the pickle's stack"),
        (b"\x80\x02(K\x01t", "1 more bytes"),
        (b"\x80\x02K\x01(a.", "a value on the pickle's stack"),
        (b"\x80\x02t.", "a mark"),
        (b"\x80\x02K\x01\x86.", "a value on the pickle's stack"),
        (b"\x80\x02)K\x01a.", "a list to append to"),
        (b"\x80\x02]K\x01K\x02s.", "a dictionary to set items of"),
        (b"\x80\x02K\x01)R.", "a function to call"),
        (b"\x80\x02cos\nsystem\nK\x01R.", "a tuple of arguments"),
        (b"\x80\x02K\x01Nb.", "an object that has a state"),
        (b"\x80\x02cos", "a line of text"),
        (b"\x80\x02X\xff\xff\xff\xffa.", "4294967295 more bytes"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\xffa.", "18446744073709551615 more bytes"),
        (b"\x80\x02\xfe.", "byte 0xfe"),
    ];
    for (bytes, expected) in cases {
        let error = read(bytes, 1000, &Limits::default()).unwrap_err();
        assert!(error.to_string().contains(expected), "{bytes:x?}: {error}");
        let Error::Corrupt(fault) = error else { panic!("{error}") };
        assert!(fault.offset_bytes.is_some_and(|it| it >= 1000));
    }
}

#[test]
fn what_only_code_needs_is_unsupported() {
    let refused: &[&[u8]] = &[b"\x80\x02\x82\x01.", b"\x80\x05\x97.", b"\x80\x05N\x98.", b"\x80\x09N."];
    for bytes in refused {
        assert!(
            matches!(read(bytes, 0, &Limits::default()).unwrap_err(), Error::Unsupported(_)),
            "{bytes:x?}"
        );
    }
}

#[test]
fn instances_of_old_classes_are_kept_as_calls_and_never_made() {
    for bytes in [&b"(I1\nios\nsystem\np0\n."[..], b"(cos\nsystem\nI1\no."] {
        let pickle = read(bytes, 0, &Limits::default()).unwrap();
        let Value::Call(call) = pickle.root else { panic!("{:?}", pickle.root) };
        let call = &pickle.arena.calls[call as usize];
        assert_eq!(pickle.arena.run(call.args), [Value::Int(Wide(1))]);
        assert_eq!(pickle.arena.symbols[0].to_string(), "os.system");
    }
    for bytes in [&b"(o."[..], b"o.", b"ios\nsystem\n.", b"(I1\no."] {
        assert!(matches!(read(bytes, 0, &Limits::default()).unwrap_err(), Error::Corrupt(_)), "{bytes:?}");
    }
}

#[test]
fn persistent_ids_are_what_the_container_writes() {
    let class = b"((U\x06modulecnn\nLinear\nNNtQ)R.";
    let of = |bytes: &[u8], ids| {
        let skeleton = Skeleton { bytes: bytes.to_vec(), holes: Vec::new(), start_byte: 0, end_byte: 0 };
        read_skeleton(&skeleton, ids, &Limits::default()).map(|it| it.root)
    };
    let class = &class[1..];
    assert!(matches!(of(class, PersistentIds::StoragesAndClasses), Ok(Value::Call(_))));
    assert!(of(class, PersistentIds::Storages).is_err());
    for number in [&b"P1001\n."[..], b"U\x041001Q.", b"K\x07Q."] {
        assert!(matches!(of(number, PersistentIds::Numbers), Ok(Value::Storage(0))));
        assert!(matches!(of(number, PersistentIds::StoragesAndClasses), Err(Error::Corrupt(_))));
    }
}

#[test]
fn deep_nesting_is_built_and_dropped_without_recursion() {
    let bytes = [b"\x80\x02".to_vec(), vec![b']'; 200_000], vec![b'a'; 199_999], vec![b'.']].concat();
    assert!(matches!(value(&bytes), Value::List(0)));
}

proptest! {
    #[test]
    fn any_bytes_end_in_an_error_or_a_value(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        drop(read(&bytes, 0, &Limits::default()));
    }

    #[test]
    fn any_opcodes_end_in_an_error_or_a_value(
        opcodes in prop::collection::vec(
            prop::sample::select(b"(.0]a}su)tRb\x85\x86\x87eld2N\x88q\0h\0K\x01\x81\x90\x91\x93\x94cx\ny\nU\x01aISVLFpgPioQ\n\n'\\-1".to_vec()),
            0..60,
        ),
    ) {
        if let Ok(mut pickle) = read(&opcodes, 0, &Limits::default()) {
            pickle.arena.merge_duplicate_keys(1);
            // What finds the end of a pickle in a file agrees with what reads it.
            let source = MemorySource::new("x", opcodes.clone());
            let skeleton = skim(&mut Window::new(&source, 0..u64::MAX), 0, 1000).unwrap();
            prop_assert_eq!(skeleton.end_byte, opcodes.len() as u64 - pickle.trailing_bytes);
        }
    }
}
