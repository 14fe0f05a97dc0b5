package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

const (
	blockSize       = 512       // bytes: a tar archive consists of such blocks
	imageChunk      = 256 << 10 // bytes of an upload that are read or sent at a time
	maxHeaders      = 4 << 20   // bytes of headers before an entry; archive/tar reads 1 MiB of each at most
	maxImageEntries = 1_000_000
	maxPadding      = 1 << 20 // bytes after an archive's end marker; tar fills up to 10 KiB
)

// refusal says what is wrong with an archive, or with one of its entries.
type refusal string

func (r refusal) Error() string { return string(r) }

const (
	errOwner  refusal = "its owner is out of range"
	errSparse refusal = "it is a sparse file: write the archive without --sparse " +
		"(bsdtar: with --no-read-sparse)"
)

// archiveError returns the 400 for what is wrong with an archive, and any other error as it is.
func archiveError(prefix string, err error) error {
	isDisk := isType[syscall.Errno](err)
	if err == nil || isDisk || isType[*http.MaxBytesError](err) || isType[*apiError](err) {
		return err
	}
	text := "the archive is broken: " + rootCause(err)
	if isType[refusal](err) {
		text = err.Error()
	} else if err == io.EOF || err == io.ErrUnexpectedEOF {
		text = "the archive is cut off"
	}
	return &apiError{kindArchiveRefused, prefix + text}
}

// checkTar reads r to its end and returns nil if it is one complete tar archive of a root file system: with
// at least one entry, with the end marker, and without anything that tar programs read differently. The
// engine takes a truncated archive for a smaller one, and an empty body for an empty image.
func checkTar(r io.Reader) error {
	in := bufio.NewReaderSize(r, imageChunk)
	archive, err := newTarReader(in, "the body is not a tar archive")
	start, _ := in.Peek(blockSize)
	if err == nil && compression(start) != "" { // the engine decompresses even a tar archive that begins so
		err = refusal("the body is compressed: it must be a plain tar archive")
	}
	image := imageCheck{}
	if err == nil {
		err = archive.each(image.add)
	}
	if err == nil {
		err = image.end(in)
	}
	return archiveError("", err)
}

// imageCheck holds what checkTar has seen so far.
type imageCheck struct {
	entries          int
	manifest, layers bool // manifest.json at the top; what savedLayer matches
}

// savedLayer matches where docker save, crane and skopeo put the layers of an image.
var savedLayer = regexp.MustCompile(`^/(blobs(?s:/.*)?|[^/]+/layer\.tar|[0-9a-f]{64}(\.tar\.gz)?)$`)

// add returns an error for an entry that an image must not have, or one too many.
func (c *imageCheck) add(h *tar.Header, _ io.Reader) error {
	for record := range h.PAXRecords {
		if strings.HasPrefix(record, "GNU.sparse") {
			return errSparse
		}
		if h.Typeflag == tar.TypeXGlobalHeader && record != "comment" { // git archive writes one
			return refusal("some programs apply a global header to all entries, others to none")
		}
	}
	switch h.Typeflag {
	case tar.TypeXGlobalHeader:
		return nil
	case tar.TypeGNUSparse: // the engine writes one of a few bytes with as many zeros as it claims
		return errSparse
	case tar.TypeReg:
		if strings.HasSuffix(h.Name, "/") {
			return refusal("it is a file, but its name ends in a slash")
		}
	case tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		if h.Size != 0 { // programs differ on whether content follows
			return refusal("only a file can have a size")
		}
	default:
		return refusal("it is not a file, directory, link, device or FIFO")
	}
	switch {
	case h.Name == "" || outside("./"+h.Name):
		return refusal("its path is empty or contains '..'")
	case strings.Contains("/"+h.Name, "/.wh."), // the engine's storage drivers take both for deletions
		h.Typeflag == tar.TypeChar && h.Devmajor == 0 && h.Devminor == 0:
		return refusal("its name begins with .wh., or it is a device 0, 0: that stands for a deletion")
	case min(h.Uid, h.Gid) < 0 || max(h.Uid, h.Gid) >= math.MaxUint32: // the engine takes their last 32 bits
		return errOwner
	}
	if c.entries++; c.entries > maxImageEntries {
		return refusal(fmt.Sprintf("the archive has more than %d entries", maxImageEntries))
	}
	name, isFile := path.Clean("/"+h.Name), h.Typeflag == tar.TypeReg
	c.manifest = c.manifest || name == "/manifest.json" && isFile
	c.layers = c.layers || savedLayer.MatchString(name)
	if name == "/oci-layout" && isFile || c.manifest && c.layers {
		return refusal("this is a saved image and not a root file system: load it into an engine, " +
			"and upload what docker export writes of a container")
	}
	return nil
}

// outside reports whether name is empty, absolute or contains "..".
func outside(name string) bool {
	return name == "" || path.IsAbs(name) || slices.Contains(strings.Split(name, "/"), "..")
}

// end returns an error if anything but padding follows the end marker: the engine stores it, and other
// programs may find another archive there.
func (c *imageCheck) end(in io.Reader) error {
	if c.entries == 0 {
		return refusal("the archive has no entries")
	}
	rest, err := io.ReadAll(io.LimitReader(in, maxPadding+1))
	if err == nil && (len(rest) > maxPadding || len(bytes.Trim(rest, "\x00")) > 0) {
		return refusal("something follows the archive's end marker")
	}
	return err
}

// tarReader reads the entries of an archive that has to be whole, with archive/tar, as the engine does. It
// also looks at the raw headers, because archive/tar accepts some that other programs read differently:
//
//	in:     content of entry 1 | padding | headers of entry 2 | content of entry 2 | …
//	        archive reads it   | readHeaders, into headers    | archive reads it
//
// Next of archive then reads the padding and the headers from there. Everything is in blocks of 512 bytes.
type tarReader struct {
	in      *bufio.Reader
	headers bytes.Buffer // raw headers of an entry, after the padding of the one before
	offset  int64        // bytes that archive has read of in since the end of the headers
	archive *tar.Reader  // reads from the tarReader
}

// newTarReader returns a reader of the archive in. If in does not begin like one, the error is problem, and
// the format that it has.
func newTarReader(in *bufio.Reader, problem string) (*tarReader, error) {
	format, err := contentFormat(in)
	if err == nil && format != plainTar {
		err = refusal(problem + ": it is " + format)
	}
	t := &tarReader{in: in}
	t.archive = tar.NewReader(t)
	return t, err
}

// Read is the input of archive. At the end of in it returns io.ErrUnexpectedEOF, because archive/tar takes
// io.EOF for the end of the archive.
func (t *tarReader) Read(p []byte) (int, error) {
	if t.headers.Len() > 0 {
		return t.headers.Read(p)
	}
	n, err := t.in.Read(p)
	t.offset += int64(n)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// each calls add for each entry, up to the end marker. It adds the entry's name to a refusal.
func (t *tarReader) each(add func(h *tar.Header, content io.Reader) error) error {
	for {
		h, err := t.next()
		if h == nil { // the end marker, or an error that is not an entry's
			return err
		}
		if err == nil {
			err = add(h, t.archive)
		}
		if why, ok := errors.AsType[refusal](err); ok {
			return refusal(fmt.Sprintf("entry %q: %s", truncate(h.Name), why))
		}
		if err != nil {
			return err
		}
	}
}

// headerOrder matches the types of an entry's headers: its own, after GNU's long name and link (L, K) and
// POSIX's extended header (x); or a global header (g) alone. Programs differ on which one counts if there are
// two of a type, on what an x applies to if something else follows it, and on whether it applies after a g.
// A header of type NUL must be alone: it is a directory if its name ends in a slash, and Python looks at the
// name in that header even if an L or x before it gives another.
var headerOrder = regexp.MustCompile(`^(g|\x00|(LK?|KL?)?x?[^gxLK\x00])$`)

// onlyDigits matches a size in an extended header. archive/tar accepts a sign too.
var onlyDigits = regexp.MustCompile(`^[0-9]+$`)

// next skips to the next entry and returns its header, or nil at the archive's end marker. With a refusal of
// an entry, it returns a header with its name.
func (t *tarReader) next() (*tar.Header, error) {
	if _, err := io.Copy(io.Discard, t.archive); err != nil { // the unread rest of the previous entry
		return nil, err
	}
	types, err := t.readHeaders()
	if err != nil {
		return nil, err
	}
	own := [blockSize]byte(t.headers.Bytes()[t.headers.Len()-blockSize:]) // a copy: Next reads the buffer
	h, err := t.archive.Next()
	switch {
	case err == tar.ErrHeader && own[156] == tar.TypeGNUSparse: // archive/tar cannot read every sparse file
		name, _, _ := bytes.Cut(own[:100], []byte{0})
		return &tar.Header{Name: string(name)}, errSparse
	case err == io.EOF && types == "\x00":
		return nil, nil
	case err != nil:
		return nil, err
	case !headerOrder.MatchString(types), isAmbiguous(own, h.Format):
		return h, refusal("tar programs differ on how to read its headers")
	}
	for record, value := range h.PAXRecords {
		switch record {
		case "size", "GNU.sparse.size", "GNU.sparse.realsize":
			if !onlyDigits.MatchString(value) {
				return h, refusal("its extended header has a size that is not a plain number")
			}
		case "SCHILY.realsize", "SUN.holesdata": // of star and Solaris
			return h, errSparse
		case "path", "linkpath":
			if value == "" || strings.ContainsAny(types, "LK") {
				return h, refusal("its headers have an empty name, or two names")
			}
		}
		if strings.HasPrefix(record, "GNU.sparse.") && !isKnownSparse(h.PAXRecords) {
			return h, refusal("it is a sparse file of an unknown version")
		}
	}
	return h, nil
}

// isKnownSparse reports whether archive/tar reads the version of a sparse file in an extended header. It
// ignores the records of any other version; GNU tar does not.
func isKnownSparse(records map[string]string) bool {
	version := records["GNU.sparse.major"] + "." + records["GNU.sparse.minor"]
	return slices.Contains([]string{"0.0", "0.1", "1.0"}, version) ||
		version == "." && records["GNU.sparse.map"] != ""
}

// isAmbiguous reports whether programs differ on which fields an entry's own header has after its first 257
// bytes, and therefore on its name or content.
func isAmbiguous(own [blockSize]byte, format tar.Format) bool {
	hasPrefix := own[345] != 0 // GNU's format has times there, which archive/tar sometimes reads as a prefix
	switch {
	case string(own[257:263]) == "ustar\x00":
		// ustar's prefix has 155 bytes, star's 131, and only archive/tar reads star's as such: they differ if it
		// fills all 131.
		return own[475] != 0 && string(own[508:]) == "tar\x00"
	case string(own[257:265]) == "ustar  \x00": // for bsdtar, any type can be sparse
		isSparse := own[386] != 0 || own[483] != 0
		return hasPrefix && format == tar.FormatUnknown || isSparse && own[156] != tar.TypeGNUSparse
	}
	return hasPrefix // Python always reads a prefix; bsdtar does after "ustar", whatever follows that
}

// ambiguous is the type of a header that programs read differently. headerOrder matches no text that ends so.
const ambiguous = "gg"

// readHeaders reads the raw headers of an entry and returns their types. It stops after an ambiguous one.
func (t *tarReader) readHeaders() (types string, err error) {
	t.headers.Reset()
	size := -t.offset & (blockSize - 1) // of the previous entry's padding, up to a whole block
	t.offset = 0
	for length := uint64(0); ; {
		if int64(t.headers.Len())+size > maxHeaders {
			return "", refusal("an entry has more than 4 MiB of headers")
		}
		start := t.headers.Len()
		if _, err := io.CopyN(&t.headers, t.in, size+blockSize); err != nil {
			return "", err
		}
		if types != "" && !isPlain(types[len(types)-1], t.headers.Bytes()[start:][:length]) {
			return types + ambiguous, nil
		}
		header := t.headers.Bytes()[t.headers.Len()-blockSize:]
		kind, number := string(header[156:157]), bytes.TrimLeft(header[124:136], " ")
		digits := bytes.Trim(number, " \x00")
		// archive/tar ignores NULs ahead of a size, and takes blanks for 0. For GNU tar, NULs end a size, and
		// a header with a blank size is invalid.
		if !bytes.HasPrefix(number, digits) || len(number) == 0 {
			return types + ambiguous, nil
		}
		if types += kind; !strings.Contains("xLK", kind) {
			return types, nil
		}
		length, err = strconv.ParseUint(string(digits), 8, 31) // of this header's content
		if err != nil {
			return types + ambiguous, nil
		}
		size = (int64(length) + blockSize - 1) &^ (blockSize - 1)
	}
}

// recordStart matches the start of a record in an extended header: its length, one blank, and a key.
// archive/tar accepts a sign, and makes more blanks a part of the key, where GNU tar skips them.
var recordStart = regexp.MustCompile(`^[0-9]+ [^ \t]`)

// isPlain reports whether programs agree on the content of a header of type x, L or K. A long name must not
// be empty, since archive/tar then takes that of the entry's own header.
func isPlain(kind byte, content []byte) bool {
	if kind != tar.TypeXHeader {
		return len(content) > 0 && content[0] != 0
	}
	for len(content) > 0 {
		if !recordStart.Match(content) {
			return false
		}
		number, _, _ := bytes.Cut(content, []byte(" "))
		length, err := strconv.Atoi(string(number))
		if err != nil || length < 1 || length > len(content) {
			return false
		}
		content = content[length:]
	}
	return true
}

// plainTar is what contentFormat calls a tar archive.
const plainTar = "a tar archive that is not compressed"

// contentFormat names the format of a stream by its first block.
func contentFormat(in *bufio.Reader) (string, error) {
	start, err := in.Peek(blockSize)
	if err != nil && err != io.EOF {
		return "", err
	}
	if len(start) == 0 {
		return "empty", nil
	}
	// If the header is valid but its entry goes on after this block, the error is not ErrHeader.
	_, err = tar.NewReader(bytes.NewReader(start)).Next()
	if len(start) == blockSize && err != tar.ErrHeader {
		return plainTar, nil
	}
	if format := compression(start); format != "" {
		return format, nil
	}
	kind := http.DetectContentType(bytes.TrimPrefix(start, []byte("\uFEFF")))
	return strings.Replace(kind, "text/html; charset=utf-8", "HTML", 1), nil
}

// signatures are the first bytes of what is taken for a .tar.gz archive by mistake, and of what the engine
// decompresses.
var signatures = []struct{ start, format string }{
	{"\x1f\x8b", gzipFormat}, {"\x1f\x9d", "compressed by compress"},
	{"BZh", "compressed by bzip2"}, {"\xfd7zXZ", "compressed by xz"},
	{"\x28\xb5\x2f\xfd", "compressed by zstd"},
	{"\x04\x22\x4d\x18", "compressed by lz4"}, {"\x02\x21\x4c\x18", "compressed by lz4"},
	{"7z\xbc\xaf\x27\x1c", "a 7z archive"},
	{"PK\x03\x04", "a zip archive"}, {"PK\x05\x06", "a zip archive"}, {"PK\x07\x08", "a zip archive"},
}

const gzipFormat = "gzip"

// compression names the format of what starts with a magic number, or returns "".
func compression(start []byte) string {
	for _, s := range signatures {
		if bytes.HasPrefix(start, []byte(s.start)) {
			return s.format
		}
	}
	if len(start) > 4 && string(start[1:4]) == "\x2a\x4d\x18" { // a skippable frame, see RFC 8878
		return "compressed by zstd or lz4"
	}
	return ""
}

// readerFunc adapts a function to io.Reader.
type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
