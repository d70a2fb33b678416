//! What a pickle of tensors is made of.

use candle_core::DType;

/// A value of a pickle. Numbers in it are places in the tables of [`Pickle`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) enum Value<'a> {
    /// `None`, floats and lists, in which nothing is looked up.
    #[default]
    Opaque,
    Bool,
    Int(i64),
    Str(&'a str),
    Global(Global),
    Tuple(usize),
    Dict(usize),
    Storage(usize),
    Tensor(usize),
}

/// The names that a pickle may refer to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(StorageKind),
}

/// The type of the elements of a storage.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct StorageKind {
    /// What Candle calls it, or torch's name of the storage if Candle has no such type.
    pub dtype: Result<DType, &'static str>,
    pub elem_size: usize,
}

impl Global {
    /// The meaning of a name, if it is one of those that are allowed.
    pub fn named(module: &str, name: &str) -> Option<Self> {
        let kind = |dtype, elem_size| Some(Self::Storage(StorageKind { dtype, elem_size }));
        match (module, name) {
            ("collections", "OrderedDict") => Some(Self::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Some(Self::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Some(Self::RebuildParameter),
            ("torch", "ByteStorage") => kind(Ok(DType::U8), 1),
            ("torch", "ShortStorage") => kind(Ok(DType::I16), 2),
            ("torch", "IntStorage") => kind(Ok(DType::I32), 4),
            ("torch", "LongStorage") => kind(Ok(DType::I64), 8),
            ("torch", "HalfStorage") => kind(Ok(DType::F16), 2),
            ("torch", "BFloat16Storage") => kind(Ok(DType::BF16), 2),
            ("torch", "FloatStorage") => kind(Ok(DType::F32), 4),
            ("torch", "DoubleStorage") => kind(Ok(DType::F64), 8),
            ("torch", "CharStorage") => kind(Err("CharStorage"), 1),
            ("torch", "BoolStorage") => kind(Err("BoolStorage"), 1),
            ("torch", "ComplexFloatStorage") => kind(Err("ComplexFloatStorage"), 8),
            ("torch", "ComplexDoubleStorage") => kind(Err("ComplexDoubleStorage"), 16),
            _ => None,
        }
    }
}

/// A run of elements in an entry of the archive.
#[derive(Debug)]
pub(super) struct Storage<'a> {
    pub kind: StorageKind,
    pub key: &'a str,
    /// The number of elements that the pickle claims.
    pub len: usize,
}

/// A tensor: a view of a storage, not checked against it.
#[derive(Debug)]
pub(super) struct TensorView {
    pub storage: usize,
    pub offset: usize,
    pub shape: Box<[usize]>,
    pub strides: Box<[usize]>,
}

/// A pickle that was read to its end.
#[derive(Debug, Default)]
pub(super) struct Pickle<'a> {
    pub root: Value<'a>,
    pub tuples: Vec<Box<[Value<'a>]>>,
    pub dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    pub storages: Vec<Storage<'a>>,
    pub tensors: Vec<TensorView>,
}

impl<'a> Pickle<'a> {
    /// The items of a dictionary, in the order of the file.
    pub fn dict(&self, id: usize) -> &[(Value<'a>, Value<'a>)] {
        &self.dicts[id]
    }

    /// A tensor and the storage it lies in.
    pub fn tensor(&self, id: usize) -> (&TensorView, &Storage<'a>) {
        let view = &self.tensors[id];
        (view, &self.storages[view.storage])
    }
}
