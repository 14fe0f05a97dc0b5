package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"slices"
	"strings"
)

const (
	blockSize = 512 // bytes: a tar archive consists of such blocks
	gzipMagic = "\x1f\x8b"
)

// limitedReader fails beyond its limit, where [io.LimitedReader] returns io.EOF.
type limitedReader struct {
	r     io.Reader
	left  int64
	ended bool // a read met the end
}

// Read counts what was read, not what was asked for: a stream that ends just at the limit is whole.
func (l *limitedReader) Read(p []byte) (int, error) {
	n, err := l.r.Read(p)
	l.ended = l.ended || err == io.EOF && n == 0
	if l.left -= int64(n); l.left < 0 {
		return 0, failure(tooLarge, "bind_contents: the archive, or what it unpacks to, has too many bytes")
	}
	return n, err
}

// drain reads the rest of the stream after [tar.Reader] has returned io.EOF, which it also does for an
// input without the end mark, two blocks of zeros: drain returns an error for that.
func (l *limitedReader) drain(to io.Writer) error {
	if l.ended {
		return io.ErrUnexpectedEOF
	}
	_, err := io.Copy(to, l)
	return err
}

// gunzip decompresses the members of a gzip stream (RFC 1952) and ignores zeros behind the last one, as
// gzip(1) does: the tar of macOS and the BSDs pads its compressed output with them.
type gunzip struct {
	packed *bufio.Reader
	member *gzip.Reader
	err    error // of the latest Read
}

func newGunzip(r io.Reader) (*gunzip, error) {
	g := &gunzip{packed: bufio.NewReaderSize(r, readChunk), member: new(gzip.Reader)}
	start, err := g.packed.Peek(blockSize)
	if err != nil && err != io.EOF {
		return nil, err
	}
	if !bytes.HasPrefix(start, []byte(gzipMagic)) {
		return nil, badArchive("not a .tar.gz archive: it is %s", contentFormat(start))
	}
	return g, g.nextMember()
}

func (g *gunzip) Read(p []byte) (n int, err error) {
	for n == 0 && g.err == nil && len(p) > 0 {
		n, g.err = g.member.Read(p)
		if g.err == io.EOF {
			g.err = g.nextMember()
		}
	}
	return n, g.err
}

// nextMember begins the next member, or returns io.EOF if only zeros are left.
func (g *gunzip) nextMember() error {
	start, _ := g.packed.Peek(len(gzipMagic))
	if string(start) == gzipMagic {
		err := g.member.Reset(g.packed)
		g.member.Multistream(false)
		return err
	}
	for {
		b, err := g.packed.ReadByte()
		if err != nil {
			return err
		}
		if b != 0 {
			return badArchive("something other than zeros follows the gzip stream")
		}
	}
}

// signatures are the first bytes of what is taken for a .tar.gz archive by mistake.
var signatures = []struct{ start, format string }{
	{gzipMagic, "gzip"}, {"\x1f\x9d", "compressed by compress"},
	{"BZh", "compressed by bzip2"}, {"\xfd7zXZ\x00", "compressed by xz"}, {"LZIP", "compressed by lzip"},
	{"\x28\xb5\x2f\xfd", "compressed by zstd"}, {"\x50\x2a\x4d\x18", "compressed by zstd"},
	{"\x04\x22\x4d\x18", "compressed by lz4"}, {"7z\xbc\xaf\x27\x1c", "a 7z archive"},
	{"PK\x03\x04", "a zip archive"}, {"PK\x05\x06", "a zip archive"}, {"PK\x07\x08", "a zip archive"},
}

// contentFormat names the format of a file by its first 512 bytes.
func contentFormat(start []byte) string {
	if len(start) == 0 {
		return "empty"
	}
	for _, s := range signatures {
		if bytes.HasPrefix(start, []byte(s.start)) {
			return s.format
		}
	}
	if isTar(start) {
		return "a tar archive that is not compressed"
	}
	kind := http.DetectContentType(bytes.TrimPrefix(start, []byte("\uFEFF")))
	if strings.HasPrefix(kind, "text/html") {
		return "HTML"
	}
	return kind
}

// isTar reports whether a file whose first 512 bytes are start is a tar archive.
func isTar(start []byte) bool {
	if len(start) < blockSize {
		return false
	}
	_, err := tar.NewReader(bytes.NewReader(start)).Next() // which fails otherwise if an entry needs more bytes
	return err != tar.ErrHeader
}

// tarReader is a [tar.Reader] for archives that have to be whole. By itself, Next returns io.EOF also where
// its input ends early, between two entries or inside an entry's padding.
type tarReader struct {
	*tar.Reader
	stream *limitedReader
	limit  int64         // of stream
	buffer *bufio.Reader // of stream
	first  byte          // type of the first header that the latest Next has read, which can be an extended one
}

// newTarReader returns a tarReader that fails beyond limit bytes, or an error if r is not a tar archive.
func newTarReader(r io.Reader, limit int64) (*tarReader, error) {
	stream := &limitedReader{r: r, left: limit}
	buffer := bufio.NewReaderSize(stream, readChunk)
	start, err := buffer.Peek(blockSize)
	if err != nil && err != io.EOF {
		return nil, err
	}
	if !isTar(start) {
		return nil, badArchive("not a .tar.gz archive: inside the gzip stream, it is %s", contentFormat(start))
	}
	return &tarReader{Reader: tar.NewReader(buffer), stream: stream, limit: limit, buffer: buffer}, nil
}

// next returns the next entry's header, or io.EOF at the end mark, two blocks of zeros. Before it there
// always are two blocks left: a header and what follows, or the end mark.
func (t *tarReader) next() (*tar.Header, error) {
	if _, err := io.Copy(io.Discard, t.Reader); err != nil { // the content that the caller has not read
		return nil, err
	}
	consumed := t.limit - t.stream.left - int64(t.buffer.Buffered())
	padding := int(-consumed & (blockSize - 1))
	blocks, err := t.buffer.Peek(padding + 2*blockSize)
	if err == io.EOF {
		return nil, io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, err
	}
	blocks = blocks[padding:]
	if !slices.ContainsFunc(blocks, func(b byte) bool { return b != 0 }) {
		return nil, io.EOF
	}
	t.first = blocks[156]
	header, err := t.Next()
	if err == io.EOF {
		return nil, io.ErrUnexpectedEOF
	}
	return header, err
}

// check returns an error for an entry after which other programs would find other entries: they disagree on
// malformed sizes in extended headers, and on whether a file whose name ends in a slash has content; and
// [tar.Reader.Next] forgets an extended header at a global one, but GNU tar does not.
func (t *tarReader) check(h *tar.Header) error {
	for _, key := range []string{"size", "GNU.sparse.size", "GNU.sparse.realsize"} {
		if size, ok := h.PAXRecords[key]; ok && (size == "" || strings.Trim(size, "0123456789") != "") {
			return errPAXSize
		}
	}
	if h.Typeflag == tar.TypeXGlobalHeader && t.first != tar.TypeXGlobalHeader {
		return errGlobal
	}
	if isDirectory(h) && h.Size != 0 && h.Typeflag != tar.TypeDir && h.Typeflag != gnuDumpDir {
		return errSizedDir
	}
	return nil
}
